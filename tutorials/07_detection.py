"""Lesson 7: a detector of torchvision, which answers with lists of boxes, as many as it finds.

    python tutorials/07_detection.py                          # a small RetinaNet, scenes of digits, about four minutes
    python tutorials/07_detection.py --coco coco2017 --epochs 12 --batch-size 16 --lr 0.01 --device cuda

How many boxes there are depends on the numbers in the image, so no exporter likes these models. The analysis follows
one forward pass on the example; boxes, scores and what suppresses doubles take no part in pruning.
The scenes are made here: real handwritten digits of scikit-learn, in random places and sizes, so that the boxes are
known and nothing has to be downloaded. `--coco` takes torchvision's RetinaNet-ResNet-50 and COCO instead.
"""

from __future__ import annotations

from typing import Any

import torch
from common import compare, parser, start
from data import load_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.models.detection import RetinaNet, retinanet_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou
from tqdm import tqdm

from oto import OTO

Scene = tuple[Tensor, dict[str, Tensor]]

# ---------------------------------------------------------------------------------------------- 1. scenes


def scene(x: Tensor, y: Tensor, draw: torch.Generator, size: int = 64) -> Scene:
    """One to three digits of 16 to 26 pixels that hardly overlap, with their boxes and classes."""
    image = torch.zeros(1, size, size)
    boxes: list[list[int]] = []
    labels: list[int] = []
    for _ in range(int(torch.randint(1, 4, (1,), generator=draw))):
        pick = int(torch.randint(len(y), (1,), generator=draw))
        side = int(torch.randint(16, 27, (1,), generator=draw))
        top, left = torch.randint(size - side + 1, (2,), generator=draw).tolist()
        box = [left, top, left + side, top + side]
        if boxes and float(box_iou(torch.tensor([box]).float(), torch.tensor(boxes).float()).max()) > 0.05:
            continue
        digit = F.interpolate(x[pick][None], (side, side), mode="bilinear")[0]
        image[:, top : top + side, left : left + side] = torch.maximum(
            image[:, top : top + side, left : left + side], digit
        )
        boxes.append(box)
        labels.append(int(y[pick]))
    return image.expand(3, -1, -1).clone(), {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}


def scenes(split: str, count: int, seed: int) -> list[Scene]:
    """Of digits that no scene of the other split shows."""
    images = load_images("digits")
    x, y = (images.train_x, images.train_y) if split == "train" else (images.test_x, images.test_y)
    x = (x - x.min()) / (x.max() - x.min())
    draw = torch.Generator().manual_seed(seed)
    return [scene(x, y, draw) for _ in range(count)]


def coco(root: str, split: str) -> list[Scene] | Any:
    """COCO as torchvision reads it (needs pycocotools), without images that show nothing and boxes without area."""
    from torchvision import datasets
    from torchvision.transforms import v2

    whole = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes()])
    names = f"{root}/annotations/instances_{split}2017.json"
    found = datasets.CocoDetection(f"{root}/{split}2017", names, transforms=whole)
    found.ids = [image for image in found.ids if found.coco.getAnnIds(image)]
    return datasets.wrap_dataset_for_transforms_v2(found, target_keys=["boxes", "labels"])


# ---------------------------------------------------------------------------------------------- 2. the detector


class Backbone(nn.Module):
    """Four convolutions; a pixel of the result stands for 4×4."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b, stride in ((3, 32, 1), (32, 48, 2), (48, 64, 2), (64, 64, 1)):
            layers += [nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.out_channels = 64

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def detector(args: Any) -> nn.Module:
    torch.manual_seed(args.seed)
    if args.coco:
        backbone = None if args.from_scratch else "DEFAULT"
        return retinanet_resnet50_fpn(weights=None, weights_backbone=backbone, min_size=args.min_size)
    anchors = AnchorGenerator(sizes=((16, 20, 25),), aspect_ratios=((1.0,),))
    return RetinaNet(
        Backbone(),
        num_classes=10,
        anchor_generator=anchors,
        min_size=64,
        max_size=64,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        detections_per_img=10,
        topk_candidates=50,
    )


@torch.no_grad()
def scores(model: nn.Module, test: Any, device: str) -> list[str]:
    """Precision, recall and F1 of boxes with a score of at least 0.4: right class, overlap with the true one over 0.5;
    and the mean loss, which says something before the first box is found."""
    model.to(device).eval()
    hits = said = wanted = 0
    losses = 0.0
    for image, truth in test:
        (found,) = model([image.to(device)])
        sure = found["scores"] >= 0.4
        boxes, labels = found["boxes"][sure].cpu(), found["labels"][sure].cpu()
        free = torch.ones(len(truth["boxes"]), dtype=torch.bool)
        for box, label in zip(boxes, labels, strict=True):  # the surest first
            fits = (box_iou(box[None], truth["boxes"])[0] > 0.5) & (truth["labels"] == label) & free
            if fits.any():
                free[int(fits.nonzero()[0])] = False
                hits += 1
        said, wanted = said + len(boxes), wanted + len(truth["boxes"])
        model.training = True  # this module alone: it returns losses, and its batch norms do not notice
        losses += float(sum(model([image.to(device)], [{k: v.to(device) for k, v in truth.items()}]).values()))
        model.training = False
    precision, recall = hits / max(said, 1), hits / max(wanted, 1)
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return [*(f"{100 * value:.2f} %" for value in (precision, recall, f1)), f"{losses / len(test):.4f}"]


# ---------------------------------------------------------------------------------------------- 3. the lesson


def main() -> None:
    flags = parser(__doc__, "07_detection")
    flags.add_argument("--coco", help="folder of COCO 2017; default: scenes of digits")
    flags.add_argument("--from-scratch", action="store_true", help="no pretrained backbone with --coco")
    flags.add_argument(
        "--min-size", type=int, default=800, help="pixels of the shorter side that images get with --coco"
    )
    flags.add_argument("--scenes", type=int, default=2000)
    flags.add_argument("--test-scenes", type=int, default=200)
    flags.add_argument("--epochs", type=int, default=5)
    flags.add_argument("--batch-size", type=int, default=16)
    flags.add_argument("--lr", type=float, default=2e-3)
    flags.add_argument("--target-macs", type=float, default=0.5)
    args = start(flags, {"scenes": 96, "test_scenes": 8, "batch_size": 4, "epochs": 1})
    if args.coco:
        train, test = coco(args.coco, "train"), coco(args.coco, "val")
    else:
        train, test = scenes("train", args.scenes, seed=1), scenes("test", args.test_scenes, seed=2)

    model = detector(args).to(args.device)
    before = scores(model, test, args.device)

    # A detector takes a list of images. Its positional arguments are a tuple with one list in it. By default OTO tries
    # the class with other widths and keeps whole what gives something else; with other widths other boxes are found, so
    # that says nothing here. `allow_graph=True` tries nothing, and the slim model is of the class all the same.
    oto = OTO(model, ([test[0][0].to(args.device)],), allow_graph=True)
    print(oto.explain(), "\n")
    steps = args.epochs * (len(train) // args.batch_size)
    optimizer = oto.hesso(
        variant="adamw",
        lr=args.lr,
        weight_decay=0.01,
        target_macs=args.target_macs,
        total_steps=steps,
        start_pruning_step=0.05,  # a detector that knows nothing yet learns little from the default's 1 %
    )
    print(optimizer.plan(), "\n")
    schedule = OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.1)

    draw = torch.Generator().manual_seed(args.seed)
    model.train()
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for _ in range(args.epochs):
            for index in torch.randperm(len(train), generator=draw).split(args.batch_size):
                if len(index) < args.batch_size:
                    continue
                batch = [train[i] for i in index.tolist()]
                images = [image.to(args.device) for image, _ in batch]
                truths = [{key: value.to(args.device) for key, value in truth.items()} for _, truth in batch]
                loss = sum(model(images, truths).values())
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
            tqdm.write(f"loss {loss.item():.3f}; {optimizer.progress}")

    subnet = oto.construct_subnet(out_dir=args.out)
    rows = {
        "before": (detector(args), subnet.cost_before, before),
        "zeroed": (model, subnet.cost_before, scores(model, test, args.device)),
        "slim": (subnet.model, subnet.cost_after, scores(subnet.model, test, args.device)),
    }
    image = test[0][0]
    compare(rows, ["precision", "recall", "F1", "loss"], lambda m: m([image]), "one image", args.passes)
    print("before: untrained\n")
    print(subnet)


if __name__ == "__main__":
    main()
