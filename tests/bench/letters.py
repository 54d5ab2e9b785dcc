"""Render a data set of letters from this machine's fonts: a task that is new to the demo's donors.

26 lower-case letters, 32 x 32, turned, sheared, blurred and noisy; the fonts of the test images are
of other families than those of the training images. README's figures used the 230 fonts of some
Debian font packages (dejavu, liberation, freefont, lato, roboto, urw-base35 and others).

    python tests/bench/letters.py FOLDER [--train 20] [--test 60]
"""

from __future__ import annotations

import argparse
import random
import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONT_FOLDERS = (Path("/usr/share/fonts"), Path("/Library/Fonts"), Path("C:/Windows/Fonts"))
NOT_LETTERS = ("math", "symbol", "dingbat", "d050000", "z003", "bullet", "keyboard", "initials")


def fonts_with_letters() -> list[Path]:
    """Font files that draw six different letters for ``abcxyz``."""
    files = sorted(
        path
        for folder in FONT_FOLDERS
        for path in folder.rglob("*")
        if path.suffix.lower() in (".ttf", ".otf")
        and not any(word in path.name.lower() for word in NOT_LETTERS)
    )
    found = []
    for path in files:
        try:
            font = ImageFont.truetype(str(path), 24)
        except OSError:
            continue
        if len({bytes(font.getmask(letter)) for letter in "abcxyz"}) == 6:
            found.append(path)
    return found


def draw(letter: str, font: Path, generator: random.Random) -> Image.Image:
    """One image of a letter."""
    size = generator.randint(18, 28)
    image = Image.new("L", (40, 40), 0)
    centre = (20 + generator.uniform(-3, 3), 20 + generator.uniform(-3, 3))
    ImageDraw.Draw(image).text(
        centre,
        letter,
        fill=generator.randint(150, 255),
        font=ImageFont.truetype(str(font), size),
        anchor="mm",
    )
    image = image.rotate(generator.uniform(-15, 15), resample=Image.Resampling.BILINEAR)
    shear = generator.uniform(-0.2, 0.2)
    image = image.transform(
        (40, 40),
        Image.Transform.AFFINE,
        (1, shear, -20 * shear, 0, 1, 0),
        resample=Image.Resampling.BILINEAR,
    )
    if generator.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(generator.uniform(0.4, 1.1)))
    noise = np.random.default_rng(generator.randrange(2**31)).normal(0, 12, (32, 32))
    pixels = np.asarray(image.crop((4, 4, 36, 36)), float) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=20, help="images a letter")
    parser.add_argument("--test", type=int, default=60, help="images a letter")
    args = parser.parse_args()
    fonts = fonts_with_letters()
    families = sorted({font.name.lower()[:5] for font in fonts})
    if len(families) < 6:
        raise SystemExit(f"{len(fonts)} fonts of {len(families)} families are too few")
    random.Random(0).shuffle(families)
    of_training = set(families[: int(0.65 * len(families))])
    for seed, split in enumerate(("train", "test"), start=1):
        chosen = [f for f in fonts if (f.name.lower()[:5] in of_training) == (split == "train")]
        generator = random.Random(seed)
        for letter in string.ascii_lowercase:
            folder = args.folder / split / letter
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(getattr(args, split)):
                image = draw(letter, generator.choice(chosen), generator)
                image.save(folder / f"{number:04d}.png")
    print(f"{len(fonts)} fonts of {len(families)} families; written to {args.folder}")


if __name__ == "__main__":
    main()
