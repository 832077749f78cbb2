"""VTPH: worked values of prompts and loss, counterparts, remembered features, checkpoints, the command line."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import load
from common.errors import UserError
from common.types import Batch, Progress
from models.blocks.concept_head import ConceptCodes
from models.blocks.memory import MemoryBank
from models.vtph import VTPH, Prompts, TextFeatures, VTPHConfig, caption_triplets, jeffreys_affinity, js_affinity
from tests import commands, datasets
from tests.processes import run_processes
from tests.tiny_models import (
    SHAPE,
    assert_same_training,
    build,
    data_info,
    pick,
    rows_of,
    section,
)
from tests.worked import filled, multi_hot, wave
from utils.distributed import rank, world_size

START = Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1)
DOUBLE = torch.float64
GOLDEN = Path(__file__).parent / "golden" / "VTPH-original-b16B8C24s1901.npz"
COUNTERPART = frozenset({"counterpart_image", "counterpart_caption"})


def vtph(folder: Path | str, **overrides: Any) -> VTPH:
    model = build("VTPH", str(folder), **{"bits": 16, **overrides})
    assert isinstance(model, VTPH)
    return model


# ---------------------------------------------------------------------------------------------- worked values


def prompt_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the prompts in the authors' checkpoints."""
    shapes: dict[str, tuple[int, ...]] = {
        "vap.fc.0.weight": (width, width),
        "vap.fc.0.bias": (width,),
        "tap.mlp.0.weight": (width // 4, width),
        "tap.mlp.0.bias": (width // 4,),
        "tap.mlp.3.weight": (width, width // 4),
        "tap.mlp.3.bias": (width,),
    }
    for tower in ("te_i", "te_t"):
        for layer in range(2):
            block = f"{tower}.resblocks.{layer}"
            shapes |= {f"{block}.{norm}.{kind}": (width,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= {f"{block}.attn.out_proj.weight": (width, width), f"{block}.attn.out_proj.bias": (width,)}
            shapes |= {f"{block}.mlp.c_fc.weight": (4 * width, width), f"{block}.mlp.c_fc.bias": (4 * width,)}
            shapes |= {f"{block}.mlp.c_proj.weight": (width, 4 * width), f"{block}.mlp.c_proj.bias": (width,)}
    return shapes


def check(values: Tensor, total: float, squares: float, first: list[float]) -> None:
    assert values.dtype == DOUBLE
    assert values.sum().item() == pytest.approx(total, abs=2e-7)
    assert values.square().sum().item() == pytest.approx(squares, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(values.flatten()[:3], torch.tensor(first, dtype=DOUBLE), atol=1e-8, rtol=0)


def test_worked_prompts() -> None:
    width = 512
    values = filled(prompt_shapes(width), norms=("ln_",), dtype=DOUBLE)
    state = VTPH.import_reference({f"vtp.{name}": value for name, value in values.items()})
    prompts = Prompts(width, VTPHConfig.model_validate(section("VTPH"))).double().eval()
    prompts.load_state_dict({name.removeprefix("prompts."): value for name, value in state.items()})
    patches = wave(0.1, 6, width, DOUBLE).view(3, 2, width).transpose(0, 1)
    class_token = wave(0.2, 2, width, DOUBLE)
    tokens = wave(0.3, 8, width, DOUBLE).view(4, 2, width).transpose(0, 1)
    pooled = wave(0.4, 2, width, DOUBLE)
    caption = wave(0.5, 8, width, DOUBLE).view(4, 2, width).transpose(0, 1)
    with torch.no_grad():
        prompted, adapted = prompts.prompt(tokens, class_token), prompts.adapt(pooled)
        image = prompts.image_blocks(torch.cat([class_token[:, None], patches], dim=1))
        text = prompts.text_blocks(torch.cat([adapted[:, None], prompted, caption], dim=1))[:, :5]
        alone = prompts.text_blocks(torch.cat([adapted[:, None], tokens], dim=1))
    check(prompted.transpose(0, 1), -0.005585508, 0.007877486, [0.000644150, 0.002305171, 0.000541169])
    check(adapted, 1.001170464, 577.931430734, [0.511474825, 1.132895133, 0.117702850])
    check(image[:, 1:].transpose(0, 1), -26.504811587, 225355.854389034, [5.748608541, 11.285598233, -9.813518503])
    check(image[:, 0], -7.892325230, 75086.275705863, [5.847269129, 11.298146385, -9.906542744])
    check(text[:, 1:].transpose(0, 1), -31.322535151, 303519.691194932, [6.201038882, 10.238726006, -9.967123682])
    check(text[:, 0], -6.692925169, 74320.271371573, [6.703316757, 11.552553968, -9.419269422])
    check(alone[:, 1:].transpose(0, 1), -34.058282914, 305530.933892255, [6.498735681, 11.237644090, -9.727644378])
    check(alone[:, 0], -6.692641650, 74344.705228688, [6.706087441, 11.558074157, -9.415545076])


def test_worked_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryBank, "write", lambda *_: None)  # the worked banks are those after the writing
    batch = rows_of()
    data = data_info(Batch({**batch, "labels": multi_hot(6, 5)}), str(tmp_path))
    object.__setattr__(data, "num_train", 6)
    model = VTPH(VTPHConfig.model_validate(section("VTPH", bits=8)), data).double()
    for name, start in (("image_local", 0.1), ("text_local", 0.2), ("image_global", 0.3), ("text_global", 0.4)):
        model.banks.get_buffer(f"{name}.rows").copy_(wave(start, 6, 8, DOUBLE))
    model.banks.train_labels.copy_(multi_hot(6, 5))

    def codes(feature: float, global_hash: float, local_hash: float) -> ConceptCodes:
        return ConceptCodes(
            F.normalize(wave(feature, 4, 16, DOUBLE), dim=-1),
            0.9 * wave(global_hash, 4, 8, DOUBLE),
            0.9 * wave(local_hash, 4, 8, DOUBLE),
            torch.empty(0),
        )

    image, text = codes(0.9, 0.5, 0.7), codes(1.0, 0.6, 0.8)
    pooled, caption, adapted = (wave(start, 4, 16, DOUBLE) for start in (1.1, 1.2, 1.3))
    temperature = 0.07 + 500 * jeffreys_affinity(pooled, caption)
    assert temperature.tolist() == pytest.approx([0.195590012, 0.198041737, 0.230460764, 0.224676562], abs=1e-9)
    out = model.objective(torch.arange(4), multi_hot(4, 5), image, text, pooled, caption, adapted)
    t = {name: term.item() for name, term in out.terms.items()}
    worked = {
        1.593455314: t["local_likelihood_image"] + t["local_likelihood_text"],
        14.917294420: 10 * (t["global_likelihood_image"] + t["global_likelihood_text"]),
        4.371385865: 8 * (t["quantization_image"] + t["quantization_text"]),
        1.310482156: 50 * t["contrast"],
        0.280365248: t["distillation"],
        0.207036263: t["triplet"],
        22.680019267: out.loss.item(),
    }
    for value, ours in worked.items():
        assert ours == pytest.approx(value, abs=2e-9)


# ---------------------------------------------------------------------------------------------- terms


def test_affinities_against_their_definitions() -> None:
    draw = torch.Generator().manual_seed(2)
    text, caption = torch.randn(3, 7, generator=draw, dtype=DOUBLE), torch.randn(3, 7, generator=draw, dtype=DOUBLE)
    p, q = text.softmax(-1), caption.softmax(-1)

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    torch.testing.assert_close(jeffreys_affinity(text, caption), (divergence(p, q) + divergence(q, p)) / 7)
    middle = (p + q) / 2
    torch.testing.assert_close(js_affinity(text, caption), (divergence(p, middle) + divergence(q, middle)) / 2)
    far = torch.tensor([[200.0, -200.0]])
    assert js_affinity(far, -far).item() == pytest.approx(math.log(2))
    for affinity in (jeffreys_affinity, js_affinity):
        torch.testing.assert_close(affinity(text, text), torch.zeros(3, dtype=DOUBLE), atol=1e-15, rtol=0)


def test_triplets_against_a_loop() -> None:
    draw = torch.Generator().manual_seed(3)
    adapted, caption = torch.randn(5, 6, generator=draw), torch.randn(5, 6, generator=draw)
    cosine = F.cosine_similarity(adapted[:, None], caption[None], dim=-1)
    total = 0.0
    for a in range(5):
        for b in range(5):
            if a != b:
                total += max(0.0, float(0.3 + cosine[a, b] - cosine[a, a]))
                total += max(0.0, float(0.3 + cosine[a, b] - cosine[b, b]))
    assert caption_triplets(adapted, caption, 0.3).item() == pytest.approx(total / 5, rel=1e-5)
    assert caption_triplets(adapted[:1], caption[:1], 1.0).item() == 0


# ---------------------------------------------------------------------------------------------- the model


def test_clip_and_the_unused_projections_are_frozen(tmp_path: Path) -> None:
    model = vtph(tmp_path)
    model.train()
    assert not model.backbone.training and model.head.training and model.prompts.dropout.training
    model(rows_of(), START).loss.backward()
    grouped = {id(p) for group in model.param_groups()["main"].values() for p in group}
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("backbone.", "head.image_projection.", "head.text_projection."))
        assert parameter.requires_grad != frozen and (id(parameter) in grouped) != frozen
        assert (parameter.grad is None) == frozen, name


def test_norms_have_the_eps_that_the_gate_needs(tmp_path: Path) -> None:
    model = vtph(tmp_path)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms and all(norm.eps == 1e-5 for norm in norms)


def test_text_codes_look_at_the_counterpart_and_do_without(tmp_path: Path) -> None:
    model = vtph(tmp_path).eval()
    batch = rows_of()
    text = model.read_text(batch["text"])
    adapted = model.prompts.adapt(text.pooled)

    def relaxed(batch: Batch) -> Tensor:
        tokens = model.backbone.image_tokens(batch["counterpart_image"])
        codes = model.hash_text(text, adapted, (tokens[:, 0], model.read_text(batch["counterpart_caption"])))
        return codes.global_hash + codes.local_hash

    with torch.no_grad():
        alone = model.hash_text(text, adapted, None)
        assert torch.equal(model.encode_text(batch.only(frozenset({"text"}))), alone.codes)
        full = relaxed(batch)
        assert torch.equal(model.encode_text(batch), torch.where(full >= 0, 1.0, -1.0))
        for field in COUNTERPART:
            assert not torch.allclose(relaxed(Batch({**batch, field: batch[field].roll(1, 0)})), full, atol=1e-6)
        assert not torch.allclose(alone.global_hash + alone.local_hash, full, atol=1e-6)


@pytest.mark.parametrize("counterpart", [False, True])
def test_padding_is_read_unless_masked(tmp_path: Path, counterpart: bool) -> None:
    batch = pick(rows_of(), slice(4))

    def relaxed(model: VTPH, other_padding: bool) -> Tensor:
        """With or without another vector where CLIP saw padding."""

        def moved(ids: Tensor) -> TextFeatures:
            text = model.read_text(ids)
            changed = (ids == 0)[..., None] & other_padding
            return TextFeatures(ids, text.pooled, torch.where(changed, text.tokens.flip(-1), text.tokens))

        text, other = moved(batch["text"]), None
        if counterpart:
            other = model.backbone.image_features(batch["image"]), moved(batch["image_caption"])
        codes = model.hash_text(text, model.prompts.adapt(text.pooled), other)
        return codes.global_hash + codes.local_hash

    with torch.no_grad():
        reading, masking = vtph(tmp_path).eval(), vtph(tmp_path, mask_padding=True).eval()
        assert not torch.allclose(relaxed(reading, True), relaxed(reading, False), atol=1e-5)
        torch.testing.assert_close(relaxed(masking, True), relaxed(masking, False))


# ---------------------------------------------------------------------------------------------- remembered features


def train(cache_dir: str, fields: list[str], batches: list[list[int]]) -> dict[str, Any]:
    """Some steps after remembering fields, in batches that lack them; losses and the state at the end."""
    model, split = vtph(cache_dir, prompt_dropout=0.0).train(), rows_of()
    if fields:
        for rows in batches[:3]:
            model.remember(pick(split.only(frozenset(fields)), rows))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    losses = []
    for rows in batches:
        out = model(pick(split.only(model.fields - frozenset(fields)), rows), START)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    return {"losses": losses, "state": model.state_dict()}


@pytest.mark.parametrize("fields", [["image", "image_caption"], ["image", "text", "image_caption"], ["text"]])
def test_remembered_features_train_as_computed_ones(tmp_path: Path, fields: list[str]) -> None:
    epoch = [[3, 1, 8, 5], [10, 0, 2, 7], [6, 9, 4]]
    computed, remembered = train(str(tmp_path), [], epoch), train(str(tmp_path), fields, epoch)
    assert remembered["losses"] == computed["losses"]  # the same batches: to the last bit
    for name, value in computed["state"].items():
        assert torch.equal(remembered["state"][name], value), name
    again = [*epoch, [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]  # other batches: CLIP rounds otherwise
    assert_same_training(train(str(tmp_path), [], again), train(str(tmp_path), fields, again), 1e-6)


def remember_shares(cache_dir: str) -> dict[str, Tensor]:
    """What every process keeps after each saw its share."""
    model, split = vtph(cache_dir), rows_of()
    for rows in ([3, 1, 8, 5], [10, 0, 2, 7], [6, 9, 4]):
        model.remember(pick(split, np.array_split(rows, world_size())[rank()].tolist()))
    return dict(model.features.named_buffers())


def test_every_process_remembers_everything(tmp_path: Path) -> None:
    alone = remember_shares(str(tmp_path))
    assert alone["image"].shape == (11, 1 + SHAPE.patches, SHAPE.embed_dim)
    for several in run_processes(remember_shares, 3, str(tmp_path)):
        assert several.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(several[name], value)


def test_features_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    model = vtph(tmp_path)
    before = set(model.state_dict())
    model.remember(rows_of())
    assert set(model.state_dict()) == before and "image" in model.features
    assert model.rememberable_fields == {"image", "text", "image_caption"}
    assert not vtph(tmp_path, cache_features=False).rememberable_fields


# ---------------------------------------------------------------------------------------------- checkpoints


def test_the_authors_checkpoint_file_loads(tmp_path: Path) -> None:
    with np.load(GOLDEN) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name.startswith("sd/")}
    parts = {
        part: {name.removeprefix(f"sd/{part}."): x for name, x in arrays.items() if name.startswith(f"sd/{part}.")}
        for part in ("vtp", "hash")
    }
    torch.save(parts, tmp_path / "model.pth")
    state = VTPH.import_reference(load(tmp_path / "model.pth").model)
    model = vtph(tmp_path)
    absent = {name for name in model.state_dict() if name not in state}
    assert absent and all(model.may_be_absent(name) for name in absent)
    assert state.keys() <= model.state_dict().keys()
    gate = parts["vtp"]["vap.fc.0.weight"]
    assert torch.equal(state["prompts.gate.weight"], gate)
    assert torch.equal(state["head.text_concepts.bit_biases.7"], parts["hash"]["lct_t.hashing.fc_list.7.bias"])


def test_a_checkpoint_whose_shared_module_is_two_is_refused() -> None:
    with np.load(GOLDEN) as file:
        state = {name.removeprefix("sd/"): torch.from_numpy(file[name]) for name in file.files if name[:3] == "sd/"}
    state["hash.gcl_t.mlp.lns.1.bias"] = state["hash.gcl_t.mlp.lns.1.bias"] + 1
    with pytest.raises(UserError, match=r"two different tensors for head\.global_concepts\.mlp\.1\.norm\.bias"):
        VTPH.import_reference(state)


# ---------------------------------------------------------------------------------------------- data and command line


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = datasets.write(tmp_path / "data")
    (root / "image_caption.txt").write_text("\n".join(f"thing {number}" for number in range(datasets.ITEMS)))
    return root


def test_marks_say_what_stood_beside_the_texts(root: Path) -> None:
    fields = VTPH.text_fields | VTPH.image_fields
    assert datasets.opened(root).marks(fields) == (
        "query texts are encoded alone, without a counterpart",
        "database texts are encoded together with their own picture and its caption",
    )
    assert not datasets.opened(root).marks(frozenset({"image", "text"}))
    alone = datasets.opened(root, database_counterpart="text_only", query_counterpart="paired")
    query, database = alone.marks(fields)
    assert "do not report these numbers" in query and "alone" in database
    assert COUNTERPART <= alone.offers("query").keys() and not COUNTERPART & alone.offers("database").keys()
    assert "image_caption" in alone.offers("train")


def test_constant_fields(root: Path) -> None:
    constant = datasets.opened(root).constant_fields("train")
    assert {"image", "image_caption", "labels"} <= constant and "text" not in constant  # items have several captions
    augmented = datasets.opened(root, augment=True).constant_fields("train")
    assert "image" not in augmented and "image_caption" in augmented


def arguments(folder: Path, settings: list[str]) -> list[str]:
    config = commands.ROOT / "configs" / "VTPH" / "coco.yaml"
    return ["--config-file", str(config), "--save-dir", str(folder), *settings]


def test_a_run_with_and_without_cache_marks_its_results(tmp_path: Path, tiny_overrides: list[str]) -> None:
    reports = []
    for cache in ("true", "false"):
        folder = tmp_path / cache
        code, out, err = commands.run(*arguments(folder, tiny_overrides), f"model.cache_features={cache}")
        assert code == 0, err
        assert "note: query texts are encoded alone, without a counterpart" in out
        assert ("keeping features of image, image_caption in memory; not of text" in err) == (cache == "true")
        steps = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        reports.append([step["loss"] for step in steps if step["event"] == "step"])
        assert len(json.loads((folder / "results.json").read_text())["marks"]) == 2
    assert reports[0][:5] == reports[1][:5]  # the first epoch's batches are those that features were made in
    assert reports[0] == pytest.approx(reports[1], rel=1e-5)


def test_generated_counterparts_are_used(tmp_path: Path, tiny_overrides: list[str]) -> None:
    folder = tmp_path / "generated"
    folder.mkdir()
    for number in range(1, 9):
        datasets.smooth_picture(number, 40, 40).save(folder / f"{number}.png")
    (folder / "captions.txt").write_text("".join(f"thing {number}\n" for number in range(8)))
    code, out, err = commands.run(
        *arguments(tmp_path / "run", tiny_overrides),
        "run.epochs=1",
        "dataset.query_counterpart=generated",
        f"dataset.counterpart_images={folder}",
        f"dataset.counterpart_captions={folder / 'captions.txt'}",
    )
    assert code == 0, err
    assert "note: query texts are encoded together with a generated picture and its caption" in out


def test_missing_image_captions_are_named(tmp_path: Path, tiny_overrides: list[str]) -> None:
    error = commands.refused(*arguments(tmp_path / "run", tiny_overrides), "dataset.image_captions=[none.mat]")
    assert "no 'image_caption' for the train split; put one of none.mat into" in error
    assert "make_image_captions.py" in error


def test_evaluation_without_image_captions_encodes_texts_alone(tmp_path: Path, tiny_overrides: list[str]) -> None:
    settings = [*arguments(tmp_path / "run", tiny_overrides), "run.epochs=1"]
    assert commands.run(*settings)[0] == 0
    checkpoint = ["--evaluate", str(tmp_path / "run" / "best.pt")]
    alone = ["dataset.image_captions=[none.mat]", "dataset.database_counterpart=text_only"]
    error = commands.refused(*settings, alone[0], *checkpoint)
    assert "for the database split" in error and "or set dataset.database_counterpart=text_only" in error
    code, out, err = commands.run(*settings, *alone, *checkpoint)
    assert code == 0, err
    assert "note: database texts are encoded alone, without a counterpart" in out


def test_image_captions_of_another_length_are_named(tmp_path: Path, tiny_overrides: list[str]) -> None:
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    error = commands.refused(
        *arguments(tmp_path / "run", tiny_overrides),
        f"dataset.image_captions=[{tmp_path / 'few.txt'}]",
    )
    assert "few.txt has 2 items; they must list the same pairs" in error


def test_generated_counterparts_without_files_are_refused(tmp_path: Path, tiny_overrides: list[str]) -> None:
    error = commands.refused(
        *arguments(tmp_path / "run", tiny_overrides),
        "dataset.query_counterpart=generated",
    )
    assert "set query_counterpart=text_only" in error
