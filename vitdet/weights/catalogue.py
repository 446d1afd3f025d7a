"""The published files by name: where each lies, what it is, and what is known of its bytes.

Only what its authors publish stands here, with one exception that names its source. Sources:
  detectron2  github.com/facebookresearch/detectron2 at 02b5c4e2: projects/ViTDet/README.md and configs. MODEL_ZOO.md
              gives the license of its models and says that their file names hold the beginning of their md5;
              ViTDet's README, whose files have names of that form, is silent on both.
  mae         github.com/facebookresearch/mae at efb2a806: README.md.
  vitdet      github.com/ViTAE-Transformer/ViTDet at 19dd30a4: README.md, logs/*.json, LICENSE.
  vitae       github.com/ViTAE-Transformer/ViTAE-Transformer at aebf1d79: Image-Classification and Object-Detection
              README.md; it has no license file.
  swin        github.com/microsoft/Swin-Transformer: MODELHUB.md, LICENSE; and
              github.com/SwinTransformer/Swin-Transformer-Object-Detection: README.md, LICENSE.
  mmdet       github.com/open-mmlab/mmdetection 2.18: configs/swin/metafile.yml; tools/model_converters/publish_model.py
              ends a file's name with the first 8 digits of its sha256.
That OneDrive no longer serves this group's links: github.com/ViTAE-Transformer/DeepSolo, issues 50 and 81.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vitdet.config import nearest

NOT_PUBLISHED = "not published"
PACKAGED = Path(__file__).parent  # where the files that ship with the package lie


@dataclass(frozen=True)
class Entry:
    """A published file. Checksums are the first hexadecimal digits or all of them; '' and None: not published."""

    name: str
    what: str
    url: str
    format: (
        str  # a name of vitdet.weights.convert.FORMATS; '' for a file that ships with the package
    )
    license: str = NOT_PUBLISHED
    recipe: str = ""  # detectors: the recipe that builds the model and trains it
    ap: tuple[float, float] | None = None  # detectors: published box AP, mask AP
    size: int | None = None  # bytes
    sha256: str = ""
    md5: str = ""
    md5_of_name: bool = False  # the md5 is what the file's name looks like, not what its page says
    other: str = ""  # pre-trainings that nobody can download: a name to start from instead
    # file: a plain download. page: a page in a browser. dead: a link that no longer serves. none: never published.
    state: Literal["packaged", "file", "page", "dead", "none"] = "file"

    @property
    def file(self) -> str:
        """The name of the fetched file: weights for train.init, or a whole detector."""
        return f"{self.name}.{'pt' if self.recipe else 'safetensors'}"

    @property
    def downloadable(self) -> bool:
        """Whether a program can fetch it."""
        return self.state == "file"

    @property
    def instead(self) -> str:
        """What to do where nothing can be downloaded."""
        own = f"convert a copy that you have (vitdet weights fetch {self.name} --from FILE)"
        if self.state == "page":
            return (
                f"download it there in a browser, then vitdet weights fetch {self.name} --from FILE"
            )
        if self.recipe:
            return f"{own}, or train it from its pre-training (vitdet train {self.recipe})"
        other = f"--set train.init={self.other}" if self.other else "vitdet weights list"
        return f"{own}, or start from other weights ({other})"


_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"
_ZOO = "CC BY-SA 3.0 (Detectron2's model zoo; its page of these files names none)"
_ONEDRIVE = "https://1drv.ms/u/s!AimBgYV7JjTl"
_DRIVE = "https://drive.google.com/drive/folders/"
_SWIN = "https://github.com/SwinTransformer/storage/releases/download/"
_FORK = "Apache-2.0 (the repository's)"


def _pretrainings() -> Iterator[Entry]:
    yield Entry(
        "mae_vit_tiny",
        "MAE, vit_tiny, on generated images without labels (vitdet weights pretrain)",
        "",
        "",
        "Apache-2.0",
        state="packaged",
    )
    mae = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_"
    # Its authors publish the md5. Size and sha256 are those by which three unrelated public projects, reading the same
    # address, know the file: OpenSDI's benchmark, dds_mamba, and Seer's reproductions.
    yield Entry(
        "mae_vit_b",
        "MAE, ViT-B, ImageNet-1K",
        f"{mae}base.pth",
        "mae",
        "CC BY-NC 4.0",
        size=343_249_461,
        sha256="aec5f0b68e5f3193a00b07bc65a37440db549c15b36b8bea242606cc40c4bc5d",
        md5="8cad7c",
    )
    yield Entry(
        "mae_vit_l",
        "MAE, ViT-L, ImageNet-1K",
        f"{mae}large.pth",
        "mae",
        "CC BY-NC 4.0",
        md5="b8b06e",
    )
    yield Entry(
        "mae_vit_h",
        "MAE, ViT-H, ImageNet-1K, patch 14 made 16 by Detectron2",
        f"{_DETECTRON2}ImageNetPretrained/MAE/mae_pretrain_vit_huge_p14to16.pth",
        "mae",
    )
    yield Entry(
        "mae_vit_h_p14",
        "MAE, ViT-H, ImageNet-1K, patch 14",
        f"{mae}huge.pth",
        "mae",
        "CC BY-NC 4.0",
        md5="9bdbb0",
    )
    # pretrained/mae_vitae_b.pth in logs/ViTAE-Base-GPU.log.json; no page links to it.
    yield Entry(
        "mae_vitae_b", "MAE, ViTAE-B, ImageNet-1K", "", "vitae", other="vitae_b", state="none"
    )
    yield Entry(
        "vitae_b",
        "classification, ViTAE-B, ImageNet-1K (83.8 %)",
        f"{_DRIVE}1KTu8dHoPVscVDPS_9qiA8UfCMb56dcsV?usp=sharing",
        "vitae_cls",
        state="page",
    )
    yield Entry(
        "vitae_s",
        "classification, ViTAE-S, ImageNet-1K (82.0 %)",
        f"{_DRIVE}1lFL_FCd3xeSNdDavmRqRY1IyboLBG1wH?usp=sharing",
        "vitae_cls",
        state="page",
    )
    yield Entry(
        "swin_t",
        "classification, Swin-T, ImageNet-1K (81.2 %)",
        f"{_SWIN}v1.0.0/swin_tiny_patch4_window7_224.pth",
        "swin_cls",
        "MIT (the repository's)",
    )
    yield Entry(
        "vitaev2_s",
        "classification, ViTAEv2-S, ImageNet-1K (82.6 %)",
        f"{_ONEDRIVE}gRgpIv58qMLokxP6?e=9kQgCo",
        "vitaev2_cls",
        state="dead",
    )


# system, data, model id, md5, box AP, mask AP
_VITDET = (
    ("mask_rcnn_vitdet_b", "COCO", "f325346929", "61ccd1", 51.6, 45.9),
    ("mask_rcnn_vitdet_l", "COCO", "f325599698", "6146ed", 55.5, 49.2),
    ("mask_rcnn_vitdet_h", "COCO", "f329145471", "7224f1", 56.7, 50.2),
    ("cascade_mask_rcnn_vitdet_b", "COCO", "f325358525", "435fa9", 54.0, 46.7),
    ("cascade_mask_rcnn_vitdet_l", "COCO", "f328021305", "1a9f28", 57.6, 50.0),
    ("cascade_mask_rcnn_vitdet_h", "COCO", "f328730692", "f05665", 58.7, 51.0),
    ("mask_rcnn_vitdet_b", "LVIS", "329225748", "5251c5", 40.2, 38.2),
    ("mask_rcnn_vitdet_l", "LVIS", "329211570", "021b3a", 46.1, 43.6),
    ("mask_rcnn_vitdet_h", "LVIS", "332434656", "866730", 49.1, 46.0),
    ("cascade_mask_rcnn_vitdet_b", "LVIS", "329226874", "df306f", 43.0, 38.9),
    ("cascade_mask_rcnn_vitdet_l", "LVIS", "329042206", "3e81c2", 49.2, 44.5),
    ("cascade_mask_rcnn_vitdet_h", "LVIS", "332552778", "11bbb7", 51.5, 46.6),
)
# name, recipe, what, end of the link, box AP, mask AP
_VITAE = (
    (
        "mask_rcnn_vit_b_coco",
        "mask_rcnn_vit_b_coco",
        "ViT-B",
        "gQuegyG-Z3FH2LDP?e=9ij98g",
        51.1,
        45.5,
    ),
    (
        "mask_rcnn_vit_b_coco_2",
        "mask_rcnn_vit_b_coco",
        "ViT-B, its authors' own MAE",
        "gRA7Y9s2rA5NC4wn?e=QfpKJf",
        51.1,
        45.4,
    ),
    (
        "mask_rcnn_vitae_b_coco",
        "mask_rcnn_vitae_b_coco",
        "ViTAE-B",
        "gQ--Ez4mzEnO-G5Y?e=ACfLxC",
        51.6,
        45.8,
    ),
    (
        "mask_rcnn_vitae_s_coco",
        "mask_rcnn_vitae_s_coco",
        "ViTAE-S",
        "gQ7PorGY53K6gIGd?e=lw81U5",
        45.6,
        40.1,
    ),
)


def _detectors() -> Iterator[Entry]:
    for system, data, number, md5, box_ap, mask_ap in _VITDET:
        recipe = f"{system}_{data.lower()}"
        kind = "Cascade Mask R-CNN" if system.startswith("cascade") else "Mask R-CNN"
        yield Entry(
            recipe,
            f"{kind}, ViTDet-{system[-1].upper()}, {data}",
            f"{_DETECTRON2}ViTDet/{data}/{system}/{number}/model_final_{md5}.pkl",
            "detectron2",
            _ZOO,
            recipe,
            (box_ap, mask_ap),
            md5=md5,
            md5_of_name=True,
        )
    for name, recipe, what, link, box_ap, mask_ap in _VITAE:
        yield Entry(
            name,
            f"Mask R-CNN, {what}, COCO (ViTAE-Transformer/ViTDet)",
            f"{_ONEDRIVE}{link}",
            "mmdet",
            _FORK,
            recipe,
            (box_ap, mask_ap),
            state="dead",
        )
    yield Entry(
        "mask_rcnn_swin_t_coco",
        "Mask R-CNN, Swin-T with FPN, COCO (SwinTransformer)",
        f"{_SWIN}v1.0.2/mask_rcnn_swin_tiny_patch4_window7.pth",
        "swin",
        "Apache-2.0 (the repository's)",
        "mask_rcnn_swin_t_coco",
        (46.0, 41.6),
    )
    swin = "mask_rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco"
    yield Entry(
        "mask_rcnn_swin_t_coco_mmdet",
        "Mask R-CNN, Swin-T with FPN, COCO (mmdetection)",
        f"https://download.openmmlab.com/mmdetection/v2.0/swin/{swin}/{swin}_20210906_131725-bacf6f7b.pth",
        "swin_mmdet",
        "Apache-2.0 (the repository's)",
        "mask_rcnn_swin_t_coco",
        (46.0, 41.6),
        sha256="bacf6f7b",
    )
    # "Coming Soon" in the README's table.
    yield Entry(
        "mask_rcnn_vitaev2_s_coco",
        "Mask R-CNN, ViTAEv2-S with FPN, COCO",
        "",
        "vitaev2",
        recipe="mask_rcnn_vitaev2_s_coco",
        ap=(47.8, 42.6),
        state="none",
    )


CATALOGUE = {entry.name: entry for entry in (*_pretrainings(), *_detectors())}


def find(name: str) -> Entry:
    """The entry of a name. Raises ValueError with the nearest name."""
    if name not in CATALOGUE:
        raise ValueError(
            f"no weights named {name!r}; {nearest(name, list(CATALOGUE))} "
            "(a .safetensors file can be given too)"
        )
    return CATALOGUE[name]


def cache_folder() -> Path:
    """Where fetched files lie if no other folder is given: ~/.cache/vitdet.

    XDG_CACHE_HOME is not asked: no setting of this package comes from the environment. --output and --weights name
    another folder. Raises FileNotFoundError where the user has no home, as in some containers.
    """
    try:
        return Path.home() / ".cache" / "vitdet"
    except RuntimeError as error:
        raise FileNotFoundError(
            "no home folder to keep weights in; give a folder with --output"
        ) from error


def fetched(name: str, folder: Path | None = None) -> Path:
    """The file of a name: in `folder` if that is given, else with the package or in the cache.

    Raises ValueError for a name that the catalogue lacks, FileNotFoundError with the command that fetches it.
    """
    entry = find(name)
    home = PACKAGED if entry.state == "packaged" else cache_folder()
    path = (folder or home) / entry.file
    if not path.is_file():
        command = f"vitdet weights fetch {name}" + (f" --output {folder}" if folder else "")
        todo = (
            f"run: {command}"
            if entry.state in ("packaged", "file")
            else f"{trouble(entry)}: {entry.instead}"
        )
        raise FileNotFoundError(f"{path}: not fetched yet; {todo}")
    return path


def trouble(entry: Entry) -> str:
    """Why no program can download it."""
    reasons = {
        "page": f"{entry.url} is a page, not a file",
        "dead": f"its link is dead ({entry.url})",
        "none": "its authors have not published it",
    }
    return reasons[entry.state]
