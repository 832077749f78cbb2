"""Captions and pictures by generative models: tiny ones of the real classes, with random weights, from folders."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data import generation, make_generated_images, make_image_captions
from data.generation import Journal
from tests import commands, datasets

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")

CONFIG = str(commands.ROOT / "configs" / "VTPH" / "coco.yaml")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "cat", "dog", "red", "green", "blue", "white", "and", "picture", "of"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder must do without the network."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))


def tokenizer(length: int) -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_blip(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    text = {**SIZES, **MARKS, "sep_token_id": 2, "vocab_size": len(WORDS), "encoder_hidden_size": 32}
    config = transformers.BlipConfig(text_config={**text, "max_position_embeddings": 64}, vision_config=vision)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.BlipImageProcessor(size=size).save_pretrained(folder)
    tokenizer(64).save_pretrained(folder)
    return folder


def make_vit_gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    encoder = transformers.ViTConfig(**SIZES, image_size=32, patch_size=16)
    decoder = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=len(WORDS), **MARKS)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    model = transformers.VisionEncoderDecoderModel(config)
    model.generation_config = transformers.GenerationConfig(decoder_start_token_id=1, **MARKS)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer(64).save_pretrained(folder)
    return folder


def make_stable_diffusion(folder: Path) -> Path:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
    )
    text = transformers.CLIPTextConfig(
        **SIZES, **MARKS, max_position_embeddings=16, vocab_size=len(WORDS), projection_dim=32
    )
    diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=clip_tokenizer(folder.parent / "vocabulary"),
        safety_checker=None,
        feature_extractor=None,
    ).save_pretrained(folder)
    return folder


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's class over a vocabulary of letters; unknown ones are the end of the text."""
    folder.mkdir()
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghij", "a</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=16)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stable_diffusion(tmp_path_factory.mktemp("models") / "diffusion")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return datasets.write(tmp_path / "data")


def captioned(model: Path, root: Path, *more: str) -> int:
    return make_image_captions.main(
        [
            *("--config-file", CONFIG, "--model", str(model), "--batch-size", "5", "--device", "cpu"),
            *("--max-tokens", "6", "--beams", "2", *more),
            *(f"dataset.root={root}", "dataset.split.query=6", "dataset.split.train=10"),
        ]
    )


def generated(diffusion: Path, blip: Path, root: Path, *more: str) -> int:
    return make_generated_images.main(
        [
            *("--config-file", CONFIG, "--model", str(diffusion), "--captioner", str(blip), "--batch-size", "4"),
            *("--device", "cpu", "--steps", "2", "--size", "32", "--max-tokens", "6", "--beams", "1", *more),
            *(f"dataset.root={root}", "dataset.split.query=6", "dataset.split.train=10"),
        ]
    )


@pytest.mark.parametrize("make", [make_blip, make_vit_gpt2])
def test_captions_of_a_data_set(make: Callable[[Path], Path], tmp_path: Path, root: Path) -> None:
    assert captioned(make(tmp_path / "model"), root) == 0
    data = datasets.opened(root)
    texts = [texts for texts in data.columns["train"]["image_caption"].captions.texts]
    assert len(texts) == datasets.ITEMS and all(len(text) == 1 for text in texts)
    assert sorted(path.name for path in root.iterdir()) == [
        "caption.mat",
        "image_caption.mat",
        "images",
        "index.mat",
        "label.mat",
    ]


def test_captions_as_json_lines(blip: Path, root: Path) -> None:
    assert captioned(blip, root, "--output", "image_caption.jsonl") == 0
    lines = [json.loads(line) for line in (root / "image_caption.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"images/{number}.png" for number in range(datasets.ITEMS)]
    assert "image_caption" in datasets.opened(root).offers("train")


def test_an_interrupted_captioning_goes_on(blip: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert captioned(blip, root) == 0
    whole = (root / "image_caption.mat").read_bytes()
    (root / "image_caption.mat").unlink()
    calls: list[int] = []
    original = generation.Captioner.captions

    def stopping(self: generation.Captioner, pictures: list[Image.Image]) -> list[str]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(pictures))
        return original(self, pictures)

    monkeypatch.setattr(generation.Captioner, "captions", stopping)
    assert captioned(blip, root) == 130
    assert not (root / "image_caption.mat").exists()
    journal = root / ".image_caption.mat.captions"
    with journal.open("ab") as file:
        file.write(b'["half a li')  # as a kill leaves it
    calls[:] = [0] * 10  # counts, but stops no more
    assert captioned(blip, root) == 0
    assert calls[10:] == [5, 5, 4]
    assert (root / "image_caption.mat").read_bytes() == whole
    assert not journal.exists()


def test_a_journal_of_another_model_is_not_gone_on_from(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j", {"model": "one"})
    first.append(["a", "b"])
    assert Journal(tmp_path / "j", {"model": "one"}).batches == [["a", "b"]]
    assert Journal(tmp_path / "j", {"model": "two"}).batches == []
    assert Journal(tmp_path / "j", {"model": "one"}).batches == []


@pytest.mark.parametrize("damage", [b"\0" * 9, b"5", b'["a", 1]', b'["half a li', b"[]", b"\xff"])
def test_a_damaged_line_of_the_journal_and_those_behind_it_are_made_again(tmp_path: Path, damage: bytes) -> None:
    journal = Journal(tmp_path / "j", {})
    for captions in (["a", "b"], ["c", "d"], ["e"]):
        journal.append(captions)
    content = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(content.replace(b'["c", "d"]', damage))
    again = Journal(tmp_path / "j", {})
    assert again.batches == [["a", "b"]]
    for captions in (["c", "d"], ["e"]):
        again.append(captions)
    assert (tmp_path / "j").read_bytes() == content


def test_a_journal_on_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="j cannot be written: No space left on device"):
        Journal(tmp_path / "j", {})


def test_pictures_for_queries_and_their_captions(diffusion: Path, blip: Path, root: Path) -> None:
    assert captioned(blip, root) == 0
    assert generated(diffusion, blip, root) == 0
    folder = root / "generated"
    settings: dict[str, Any] = {
        "query_counterpart": "generated",
        "counterpart_images": str(folder),
        "counterpart_captions": str(folder / "captions.txt"),
    }
    data = datasets.opened(root, **settings, split=datasets.permutation(1, 6, 10))  # the seed of VTPH's config
    with pytest.raises(UserError, match=r"made for other queries; set the dataset\.split"):
        datasets.opened(root, **settings, split=datasets.permutation(2, 6, 10))
    number = int(data.columns["query"]["counterpart_image"].numbers[5])
    assert data.pictures.read(number).size == (32, 32)
    names = {"source.json", "captions.txt", *(f"{number}.png" for number in range(1, 7))}
    assert {path.name for path in folder.iterdir()} == names


def test_missing_pictures_are_made_again_alike(diffusion: Path, blip: Path, root: Path) -> None:
    assert generated(diffusion, blip, root) == 0
    folder = root / "generated"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("2.png", "6.png", "captions.txt"):
        (folder / name).unlink()
    assert generated(diffusion, blip, root) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len({before[f"{number}.png"] for number in range(1, 7)}) == 6
    pixels = np.array(Image.open(folder / "1.png"))
    assert generated(diffusion, blip, root, "--output", str(root / "other"), "--seed", "2") == 0
    assert not np.array_equal(np.array(Image.open(root / "other" / "1.png")), pixels)


def test_pictures_of_other_settings_are_not_mixed(
    diffusion: Path, blip: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generated(diffusion, blip, root) == 0
    capsys.readouterr()
    assert generated(diffusion, blip, root, "--seed", "2") == 2
    assert "holds pictures of other texts or settings" in capsys.readouterr().err
    (root / "generated" / "source.json").rename(root / "generated" / ".source.json.part")  # as a kill leaves it
    assert generated(diffusion, blip, root) == 2
    assert "1.png, which was not made here" in capsys.readouterr().err


def test_the_text_is_the_one_that_evaluation_takes(root: Path) -> None:
    from common.config import load_config
    from dataset.loader import build_loader
    from dataset.texts.tokenizer import tokenize

    settings = [f"dataset.root={root}", "dataset.split.query=6", "dataset.split.train=10", "dataset.vocabulary=5"]
    for caption in ("random", "first"):
        config = load_config(CONFIG, [*settings, f"evaluate.caption={caption}", "run.seed=4"])
        data = generation.open_bare_dataset(config)
        texts = make_generated_images.query_texts(data, config)
        loader = build_loader(
            data,
            "query",
            frozenset({"text"}),
            batch_size=4,
            seed=4,
            device=torch.device("cpu"),
            kind="workers",
            workers=0,
            caption=config.evaluate.caption,
        )
        ids = torch.cat([batch["text"] for batch in loader.once()])
        assert torch.equal(ids, tokenize(texts, config.dataset.text_length))


@pytest.mark.slow
def test_killed_while_captioning_then_run_again(blip: Path, root: Path) -> None:
    assert captioned(blip, root) == 0
    whole = (root / "image_caption.mat").read_bytes()
    (root / "image_caption.mat").unlink()
    script = str(commands.ROOT / "data" / "make_image_captions.py")
    options = ["--config-file", CONFIG, "--model", str(blip), "--batch-size", "5", "--device", "cpu"]
    options += ["--max-tokens", "6", "--beams", "2"]
    options += [f"dataset.root={root}", "dataset.split.query=6", "dataset.split.train=10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, script, *options], env=environment, stderr=subprocess.DEVNULL)
    journal = root / ".image_caption.mat.captions"
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 1):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert captioned(blip, root) == 0
    assert (root / "image_caption.mat").read_bytes() == whole


# ---------------------------------------------------------------------------------------------- mistakes


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("module", [None, ModuleType("old")])
@pytest.mark.parametrize("package", ["transformers", "diffusers"])
def test_packages_that_are_not_installed_or_too_old(
    package: str,
    module: ModuleType | None,
    diffusion: Path,
    blip: Path,
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, module)
    error = refused(capsys, generated(diffusion, blip, root))
    assert f"error: {package}.Auto" in error and " cannot be imported (" in error
    assert "pip install -r requirements-generation.txt" in error


def test_mistakes_are_one_line(
    diffusion: Path, blip: Path, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot be opened" in refused(capsys, captioned(diffusion, root))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "cannot be opened" in refused(capsys, captioned(empty, root))
    assert "cannot be opened" in refused(capsys, generated(blip, blip, root, "--output", str(tmp_path / "out")))
    assert "divisible by 8" in refused(capsys, generated(diffusion, blip, root, "--size", "33"))
    assert "nan is no finite number" in refused(capsys, generated(diffusion, blip, root, "--guidance", "nan"))
    index = (root / "index.mat").read_bytes()
    assert "index.mat: is there already" in refused(capsys, captioned(blip, root, "--output", "index.mat"))
    assert (root / "index.mat").read_bytes() == index
    error = refused(capsys, generated(diffusion, blip, root, "--output", str(root / "images")))
    assert "holds 0.png, which was not made here" in error
    assert "must end in .mat or .jsonl" in refused(capsys, captioned(blip, root, "--output", "captions.csv"))
    nowhere = tmp_path / "nowhere"
    assert "data folder" in refused(capsys, captioned(blip, nowhere))
    assert not nowhere.exists()
    (root / "images" / "3.png").write_bytes(b"no picture")
    assert "is not a picture" in refused(capsys, captioned(blip, root))
    assert not (root / "image_caption.mat").exists()
