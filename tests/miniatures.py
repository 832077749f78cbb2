"""The official layouts of the benchmark data sets in small, with everything that occurs in the large ones.

Tests work out by hand what the preparation scripts must make of them.
"""

import json
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from data.make_mirflickr25k import CLASSES as MIRFLICKR_CLASSES
from data.make_nuswide import TC21

ROTATED = 6  # EXIF orientation: turned by 90 degrees
EXIF_ORIENTATION = 0x0112


def picture(path: Path, number: int, mode: str = "RGB", rotated: bool = False) -> None:
    """Writes a JPEG of 40 x 30 pixels that no other number has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, (40, 30), (number * 7) % 256 if mode == "L" else ((number * 7) % 256,) * len(mode))
    image.paste(0, (0, 0, 1 + number % 40, 1 + number % 30))
    exif = Image.Exif()
    if rotated:
        exif[EXIF_ORIENTATION] = ROTATED
    image.save(path, "JPEG", exif=exif)


def text(path: Path, content: str) -> None:
    """Writes a UTF-8 text file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())


def mirflickr25k(folder: Path) -> Path:
    """24 pictures: 1 to 22 of the sky, 1 and 100 with water, 23 without a label.

    Tags: `common` in 21 files, `nineteen` in 19 (twice in the first); 2 has an empty file, 10 none, 3 only rare tags;
    file 30 has no picture. 4 is grey, 5 CMYK, 6 carries an EXIF rotation, 7 and 8 are the same bytes.
    """
    pictures = folder / "mirflickr"
    for number in [*range(1, 24), 100]:
        mode = {4: "L", 5: "CMYK"}.get(number, "RGB")
        picture(pictures / f"im{number}.jpg", number, mode, rotated=number == 6)
    (pictures / "im8.jpg").write_bytes((pictures / "im7.jpg").read_bytes())
    for number in [1, *range(4, 10), *range(11, 23), 23, 30, 100]:
        tags = [] if number == 30 else ["common"]
        tags += ["nineteen"] if number not in (23, 30, 100) else []
        tags += ["nineteen"] if number == 1 else ["lonely"] if number == 30 else []
        text(pictures / f"meta/tags/tags{number}.txt", "".join(f"{tag}\r\n" for tag in tags))
    text(pictures / "meta/tags/tags2.txt", "")
    text(pictures / "meta/tags/tags3.txt", "café\n日本\n")
    text(pictures / "doc/README.txt", "about")
    numbers = {"sky": range(1, 23), "water": (1, 100)}
    annotations = folder / "mirflickr25k_annotations_v080"
    for name in MIRFLICKR_CLASSES:
        text(annotations / f"{name}.txt", "".join(f"{number}\n" for number in numbers.get(name, (1,))))
    text(annotations / "sky_r1.txt", "23\n")
    text(annotations / "README.txt", "about")
    return folder


def nuswide(folder: Path) -> Path:
    """Six pictures, four frequent tags; see the table in the code."""
    rows = [  # picture, labels, tags, which of the frequent tags
        ("actor\\0001_11.jpg", "sky person", "blue sky", "1100"),
        ("actor\\0002_12.jpg", "zebra", "stripes tree", "0010"),
        ("beach\\0003_13.jpg", "beach", "", "0000"),
        ("lake\\0004_14.jpg", "lake water", "été 日本", "0000"),
        ("lake\\0005_15.jpg", "tree", "tree green", "0010"),
        ("sky\\0006_11.jpg", "window", "blue moon sun", "1001"),
    ]
    for number, (name, _, _, _) in enumerate(rows):
        picture(folder / "Flickr" / name.replace("\\", "/"), number, mode="CMYK" if number == 3 else "RGB")
    (folder / "Flickr/sky/0006_11.jpg").write_bytes((folder / "Flickr/actor/0001_11.jpg").read_bytes())
    text(folder / "ImageList/Imagelist.txt", "".join(f"{row[0]}\r\n" for row in rows))
    for label in [*TC21, "zebra"]:
        values = "".join(f"{int(label in row[1].split())}\n" for row in rows)
        text(folder / f"Groundtruth/AllLabels/Labels_{label}.txt", values)
    tags = "".join(f"{Path(row[0]).stem.rpartition('_')[2]}      {row[2]} \n" for row in rows)
    text(folder / "NUS_WID_Tags/All_Tags.txt", tags)
    text(folder / "NUS_WID_Tags/TagList1k.txt", "blue\r\nsky\r\ntree\r\nsun\r\n")
    text(
        folder / "NUS_WID_Tags/AllTags1k.txt", "".join("".join(f"{value}\t" for value in row[3]) + "\n" for row in rows)
    )
    return folder


def coco(folder: Path) -> Path:
    """Six pictures of train2017, two of val2017, three categories whose order is not that of their numbers."""
    categories = [{"id": 3, "name": "car"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
    objects = {  # picture: categories of its objects; 30 has none, 9 has a crowd
        "train2017": {30: [], 25: [1, 3, 1], 9: [90], 3: [3], 581: [1], 7: [1]},
        "val2017": {8: [1, 90], 2: []},
    }
    captions = {
        "train2017": [
            (25, "A car\n and  a person. "),
            (9, "Grüße 😀"),
            (25, "second"),
            (30, "empty street"),
            (581, "one"),
            (7, "seven"),
            (25, "third"),
        ],
        "val2017": [(2, "nothing"), (8, "brushing"), (8, 'a "quoted" \\ caption')],
    }
    for part, entries in objects.items():
        images = [{"id": number, "file_name": f"{number:012}.jpg", "height": 30, "width": 40} for number in entries]
        for number in entries:
            picture(folder / part / f"{number:012}.jpg", number, mode="L" if number == 9 else "RGB")
        annotations = [
            {"id": number * 10 + at, "image_id": number, "category_id": kind, "iscrowd": int(kind == 90)}
            | {"segmentation": {"counts": [1, 2], "size": [30, 40]} if kind == 90 else [[1.5, 2.25, 3.0, 4.0]]}
            for number, kinds in entries.items()
            for at, kind in enumerate(kinds)
        ]
        head = {"info": {"year": 2017, "nested": [{"a": [1]}]}, "licenses": [{"id": 1}], "images": images}
        instances = head | {"annotations": annotations, "categories": categories}
        text(folder / f"annotations/instances_{part}.json", json.dumps(instances))
        sentences = [
            {"image_id": number, "id": at, "caption": line} for at, (number, line) in enumerate(captions[part])
        ]
        text(
            folder / f"annotations/captions_{part}.json",
            json.dumps(head | {"annotations": sentences}, ensure_ascii=False),
        )
    return folder


def wiki(folder: Path) -> Path:
    """Three pairs of the training list and two of the test list, one text not well formed, as some published ones."""
    base = folder / "wikipedia_dataset"
    pairs = {  # text: picture, category
        "trainset": {"aa-1": ("i1", 1), "bb-2.5": ("i2", 10), "cc-3": ("i3", 3)},
        "testset": {"dd-4": ("i4", 3), "ee-5": ("i5", 2)},
    }
    names = {1: "art", 2: "biology", 3: "geography", 10: "warfare"}
    sections = {"bb-2.5": "Tom &amp; Jérôme\r\n\r\nwent & saw.\n", "cc-3": ""}
    for part, entries in pairs.items():
        lines = [f"{name}\t{image}\t{category}\n" for name, (image, category) in entries.items()]
        text(base / f"{part}_txt_img_cat.list", "".join(lines))
        for name, (image, category) in entries.items():
            section = sections.get(name, f"\nAbout {name}.\n")
            body = f'<?xml version="1.0"?>\n<article>\n<text>{section}</text>\n<image id="{image}"/>\n</article>\n'
            text(base / f"texts/{name}.xml", body)
            picture(base / "images" / names[category] / f"{image}.jpg", len(name) + category, rotated=name == "aa-1")
    return folder


def iaprtc12(folder: Path) -> Path:
    """Five pictures in two folders, one without a description; labels as DCMH's files have them, and as LEAR's."""
    texts = {
        "00/25": "a yellow building; two palm trees ;",
        "00/60": "caf\xe9 &amp; bar",
        "01/1003": "",
        "40/40000": "a lake",
    }
    for number, name in enumerate([*texts, "01/1004"]):
        picture(folder / f"images/{name}.jpg", number)
    for name, description in texts.items():
        head = f"<DOC>\n<DOCNO>annotations/{name}.eng</DOCNO>\n<TITLE>T</TITLE>\n"
        body = f"{head}<DESCRIPTION>{description}</DESCRIPTION>\n</DOC>\n"
        path = folder / f"annotations_complete_eng/{name}.eng"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body.encode("iso-8859-1"))
    order = ["40/40000", "1004.jpg", "images/00/25.jpg", "00\\60.jpg", "/home/x/1003.jpg"]
    labels = np.zeros((5, 255), np.uint8)
    labels[np.arange(5), [3, 0, 254, 3, 7]] = 1
    scipy.io.savemat(folder / "imgList.mat", {"imgs": np.array(order)})
    scipy.io.savemat(folder / "labelList.mat", {"labels": labels})
    for part, listed, rows in (
        ("train", ["00/25", "40/40000"], [[1, 0, 1], [0, 1, 0]]),
        ("test", ["01/1004"], [[0, 0, 1]]),
    ):
        text(folder / f"lear/iaprtc12_{part}_list.txt", "".join(f"{name}\n" for name in listed))
        values = np.array([[3, *row] for row in rows], dtype="<i2")
        (folder / f"lear/iaprtc12_{part}_annot.hvecs").write_bytes(values.tobytes())
    text(folder / "lear/iaprtc12_dictionary.txt", "building\nlake\npalm\n")
    return folder
