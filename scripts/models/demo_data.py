"""What the demo's tables hold: files of this project, and a picture of a line of text, as CSV for psql's \\copy."""

import csv
import json

import numpy as np
import onnx
from PIL import Image, ImageDraw, ImageFont

from paths import MODELS, ROOT

FOLDER = MODELS / "demo"
LINE = "Hello, PostgreSQL 15!"


def everything() -> None:
    FOLDER.mkdir(exist_ok=True)
    files()
    picture()


def table(name: str, rows) -> None:
    with open(FOLDER / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def files() -> None:
    """files(name, content) and the classifier's labels(position, label)."""
    font_picture = FOLDER / "line.png"
    draw().save(font_picture)
    paths = [ROOT / "Cargo.toml", ROOT / "Makefile", ROOT / "LICENSE", ROOT / "scripts" / "cluster",
             ROOT / "scripts" / "demo.sql", ROOT / "scripts" / "models" / "zoo.py", ROOT / "src" / "lib.rs",
             font_picture, MODELS / "expected" / "cnn-1.npz"]
    table("files", ([path.name, "\\x" + path.read_bytes().hex()] for path in paths if path.exists()))
    labels = json.loads((MODELS / "magika.json").read_text())["target_labels_space"]
    table("file_types", enumerate(labels, start=1))


def draw() -> Image.Image:
    """One line of dark text on white, 48 pixels high, as the reader expects."""
    font = ImageFont.load_default(size=30)
    canvas = Image.new("RGB", (int(font.getlength(LINE)) + 20, 48), "white")
    ImageDraw.Draw(canvas).text((10, 5), LINE, font=font, fill=(20, 20, 60))
    return canvas


def picture() -> None:
    """pictures(name, pixels) as JSON [1, 3, 48, width] in -1..1, and the reader's letters(position, letter).

    Position 1 is the blank of connectionist temporal classification; the last one is the space.
    """
    pixels = (np.asarray(draw(), dtype=np.float32) / 255 - 0.5) / 0.5
    pixels = np.round(pixels.transpose(2, 0, 1)[None] * 256) / 256
    table("pictures", [["line.png", json.dumps(pixels.tolist())]])
    reader = onnx.load(MODELS / "ocr_read.onnx", load_external_data=False)
    (letters,) = (entry.value for entry in reader.metadata_props if entry.key == "character")
    table("letters", enumerate(["", *letters.split("\n"), " "], start=1))
