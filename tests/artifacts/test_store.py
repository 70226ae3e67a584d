"""Our own format: round trips over the whole table, atomic replacement, and every bad input as one line with the fix."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rankloom
from rankloom.artifacts import files
from rankloom.errors import ArtifactError, FingerprintError
from tests import zoo

METHODS = tuple(rankloom.methods.TABLE)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    handle = zoo.adapted("lora", zoo.build("llama"), "llama")
    zoo.perturb(handle)
    return handle.save(tmp_path / "adapter")


def edit(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize("kind", zoo.MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_loads_to_the_same_function(method: str, kind: str, tmp_path: Path) -> None:
    handle = zoo.adapted(method, zoo.build(kind), kind)
    zoo.perturb(handle)
    inputs = zoo.batch(kind)
    expected = zoo.logits(handle.model, inputs)
    folder = handle.save(tmp_path / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.safetensors", "manifest.json"]
    again = rankloom.load(zoo.build(kind), folder)
    assert torch.equal(zoo.logits(again.model, inputs), expected)
    assert again.recipe == handle.recipe and again.report["init"] == handle.report["init"]
    assert again.fingerprint() == handle.fingerprint()


def test_manifest_says_what_when_and_on_what(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["format"] == "rankloom-adapter" and manifest["version"] == 1
    assert manifest["versions"].keys() >= {"rankloom", "torch", "transformers", "python"}
    assert manifest["files"]["adapter.safetensors"]["tensors"] == 28
    assert manifest["base"]["architecture"] == "LlamaForCausalLM" and len(manifest["base"]["tensors"]) == 21
    assert rankloom.Recipe.from_dict(manifest["recipe"]) == zoo.recipe_of("lora")


def test_saving_does_not_depend_on_being_attached_or_merged(tmp_path: Path) -> None:
    handle = zoo.adapted("full", zoo.build("llama"), "llama")
    zoo.perturb(handle)
    attached = handle.save(tmp_path / "attached")
    handle.detach()
    detached = handle.save(tmp_path / "detached")
    handle.attach()
    handle.merge()
    merged = handle.save(tmp_path / "merged")
    digests = {(f / "adapter.safetensors").read_bytes() for f in (attached, detached, merged)}
    bases = {json.loads((f / "manifest.json").read_text())["base"]["digest"] for f in (attached, detached, merged)}
    assert len(digests) == 1 and len(bases) == 1


def test_odd_values_in_a_report_become_plain_json(tmp_path: Path) -> None:
    handle = zoo.adapted("lora", zoo.build("llama"), "llama")
    handle.report = {"nan": float("nan"), "tensor": torch.ones(2), "tuple": (1, None), "path": tmp_path, 3: True}
    manifest = json.loads((handle.save(tmp_path / "a") / "manifest.json").read_text(), parse_constant=pytest.fail)
    assert manifest["report"] == {
        "nan": None,
        "tensor": [1.0, 1.0],
        "tuple": [1, None],
        "path": str(tmp_path),
        "3": True,
    }


# --- replacing a folder ---------------------------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_not_replaced(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds 1 other entries \(as notes.txt\).*a folder of its own"):
        zoo.adapted("lora", zoo.build("llama"), "llama").save(saved)
    assert (saved / "notes.txt").read_text() == "mine"


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(ArtifactError, match="is a file: give a folder"):
        zoo.adapted("lora", zoo.build("llama"), "llama").save(tmp_path / "adapter")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write .*: "):
        zoo.adapted("lora", zoo.build("llama"), "llama").save(tmp_path / "file" / "adapter")


class Died(BaseException):
    pass


@pytest.mark.parametrize("moment", range(4))
def test_dying_at_any_moment_leaves_one_complete_adapter(saved: Path, moment: int, monkeypatch: Any) -> None:
    old = load_file(saved / "adapter.safetensors")
    handle = rankloom.load(zoo.build("llama"), saved)
    zoo.perturb(handle, seed=8)
    new = {n: t.clone() for n, t in handle.state_dict().items()}
    calls = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Died
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:  # a killed process runs no clean-up either
        patch.setattr(files, "write_json", dying(files.write_json))
        patch.setattr(rankloom.artifacts.store, "write_json", files.write_json)
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(files.shutil, "rmtree", lambda *a, **k: None)
        if moment < 3:
            with pytest.raises(Died):
                handle.save(saved)
        else:
            handle.save(saved)
    again = rankloom.load(zoo.build("llama"), saved).state_dict()
    expected = new if moment == 3 else old
    assert all(torch.equal(again[n], expected[n]) for n in expected)
    handle.save(saved)  # and the next save cleans up
    again = rankloom.load(zoo.build("llama"), saved).state_dict()
    assert all(torch.equal(again[n], new[n]) for n in new)
    assert not (saved.parent / ".adapter.previous").exists()


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rankloom.artifacts.store, "write_tensors", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*adapter: No space left on device"):
        zoo.adapted("lora", zoo.build("llama"), "llama").save(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


# --- bad input ------------------------------------------------------------------------------------------------------------


def no_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def no_tensors(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()


def truncated(folder: Path) -> None:
    os.truncate(folder / "adapter.safetensors", 500)


def truncated_header(folder: Path) -> None:
    os.truncate(folder / "adapter.safetensors", 5)


def appended(folder: Path) -> None:
    with (folder / "adapter.safetensors").open("ab") as file:
        file.write(b"\0" * 8)


def flipped(folder: Path) -> None:
    data = bytearray((folder / "adapter.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "adapter.safetensors").write_bytes(data)


def pickled_inside(folder: Path) -> None:
    torch.save({"a": torch.zeros(2)}, folder / "adapter.safetensors")


def old_pickle_inside(folder: Path) -> None:
    (folder / "adapter.safetensors").write_bytes(pickle.dumps({"a": 1}))


def pickle_instead(folder: Path) -> None:
    empty(folder)
    torch.save({}, folder / "adapter_model.bin")


def pickled_tensors(folder: Path) -> None:
    no_tensors(folder)
    torch.save({}, folder / "adapter.pt")


def broken_json(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": ')


def json_list(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def foreign_json(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"name": "app"}')


def newer(folder: Path) -> None:
    edit(folder, version=2, versions={"rankloom": "9.1"})


def no_recipe(folder: Path) -> None:
    edit(folder, recipe=None)


def unknown_part(folder: Path) -> None:
    edit(folder, recipe={"adapter": {"kind": "lorax"}})


def odd_base(folder: Path) -> None:
    edit(folder, base={"name": "x"})


def fewer(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["adapter.safetensors"]["tensors"] = 30
    edit(folder, files=manifest["files"])


def other_names(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    tensors["stranger"] = tensors.pop("model.layers.0.mlp.up_proj.A")
    resealed(folder, tensors)


def other_shape(folder: Path) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    tensors["model.layers.0.mlp.up_proj.A"] = torch.zeros(5, 16)
    resealed(folder, tensors)


def resealed(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = folder / "adapter.safetensors"
    save_file(tensors, path)
    entry = {"sha256": files.sha256(path), "bytes": path.stat().st_size, "tensors": len(tensors)}
    edit(folder, files={path.name: entry})


BAD = {
    no_folder: r"adapter folder .* does not exist",
    empty: r"has no adapter.safetensors \(it holds nothing\)",
    no_manifest: r"has adapter.safetensors but no manifest.json: copy the whole folder",
    no_tensors: r"has no adapter.safetensors \(it holds manifest.json\)",
    truncated: r"is truncated or damaged \(500 bytes; .*copy or save the adapter again",
    truncated_header: r"is truncated or damaged \(5 bytes; ",
    appended: r"is truncated or damaged",
    flipped: r"has changed since it was saved \(sha256 \w{12}.*manifest says \w{12}.*save the adapter again",
    pickled_inside: r"is a pickle, which can run code when opened: save it again as safetensors",
    old_pickle_inside: r"is a pickle, which can run code",
    pickle_instead: r"has no adapter.safetensors but the pickle adapter_model.bin, which is never opened: save it again",
    pickled_tensors: r"but the pickle adapter.pt, which is never opened",
    broken_json: r"manifest.json is not valid JSON",
    json_list: r"manifest.json holds a JSON list, not an object",
    foreign_json: r"is not a rankloom manifest \(format None\)",
    newer: r"has format version 2 \(rankloom 9.1\), this rankloom reads up to 1: upgrade with pip install -U rankloom",
    no_recipe: r"lacks recipe",
    unknown_part: r"the recipe in .*manifest.json \(rankloom .*\) is not understood: unknown adapter 'lorax'; did you mean",
    odd_base: r"unreadable base entry",
    fewer: r"holds 28 tensors, the manifest says 30",
    other_names: r"1 of 28 missing \(as \['model.layers.0.mlp.up_proj.A'\]\), 1 unexpected \(as \['stranger'\]\)",
    other_shape: r"up_proj.A has shape \(3, 16\), the file \(5, 16\)",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda f: f.__name__)
def test_bad_input_is_one_line_and_leaves_the_model_alone(spoil: Callable[[Path], None], saved: Path) -> None:
    spoil(saved)
    model = zoo.build("llama")
    before = [(n, id(p), p.requires_grad, type(m)) for m in model.modules() for n, p in m.named_parameters()]
    with pytest.raises(ArtifactError, match=BAD[spoil]) as caught:
        rankloom.load(model, saved)
    assert "\n" not in str(caught.value)
    assert [(n, id(p), p.requires_grad, type(m)) for m in model.modules() for n, p in m.named_parameters()] == before


def test_a_file_for_a_folder(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="is a file: give the folder it is in"):
        rankloom.load(zoo.build("llama"), saved / "adapter.safetensors")


def test_pickles_are_never_opened(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle, "load", pytest.fail)
    monkeypatch.setattr(torch, "load", pytest.fail)
    pickled_inside_bytes = pickle.dumps({"a": 1})
    (saved / "adapter.safetensors").write_bytes(pickled_inside_bytes)
    with pytest.raises(ArtifactError):
        rankloom.load(zoo.build("llama"), saved)


def test_another_base_is_refused_unless_forced(saved: Path) -> None:
    other = zoo.build("llama", seed=1)
    pattern = (
        r"made on .*LlamaForCausalLM, \d+ parameters, \w{12}.*this model is .*\d+ of 21 tensors differ.*force=True"
    )
    with pytest.raises(FingerprintError, match=pattern):
        rankloom.load(other, saved)
    assert rankloom.load(other, saved, force=True).attached


def test_another_architecture_is_refused_by_fingerprint_first(saved: Path) -> None:
    with pytest.raises(FingerprintError, match=r"LlamaForCausalLM.*GPT2LMHeadModel"):
        rankloom.load(zoo.build("gpt2"), saved)


def test_loading_onto_an_attached_model_is_refused(saved: Path) -> None:
    model = zoo.build("llama")
    rankloom.load(model, saved)
    with pytest.raises(rankloom.RankloomError, match="already carries an adapter"):
        rankloom.load(model, saved)


def test_messages_carry_no_stray_whitespace(saved: Path) -> None:
    truncated(saved)
    with pytest.raises(ArtifactError) as caught:
        rankloom.load(zoo.build("llama"), saved)
    assert re.search(r"\s\s", str(caught.value)) is None
