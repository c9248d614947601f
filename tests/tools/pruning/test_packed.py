"""Packed folders: size, and bit for bit back."""

import struct
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from slow import slow_but

from act24.errors import Act24Error
from act24.tools.pruning.folder import prune_model
from act24.tools.pruning.masks import read_masks, write_masks
from act24.tools.pruning.packed import pack, read_packed
from act24.tools.run.opening import open_any
from tests.tools.pruning.test_prune_command import (  # noqa: F401
    CONFIGS,
    model_folder,
    options,
    words,
)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
@pytest.mark.parametrize("dtype", slow_but((torch.bfloat16,), [torch.float32, torch.bfloat16, torch.float16]))
def test_there_and_back(kind, pattern, dtype, model_folder, words, tmp_path):  # noqa: F811
    source = model_folder(kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(source)
    done = prune_model(str(source), tmp_path / "pruned", **options(words, pattern=pattern))
    pack(tmp_path / "pruned", tmp_path / "packed")
    pack(tmp_path / "packed", tmp_path / "back")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "back"))
    assert one.keys() == other.keys()
    bits = {2: torch.int16, 4: torch.int32}
    for name, value in one.items():
        assert value.dtype is other[name].dtype is dtype or not value.is_floating_point()
        if value.is_floating_point():
            view = bits[value.dtype.itemsize]
            assert torch.equal(value.view(view), other[name].view(view)), name
    masks = load_file(tmp_path / "back" / "masks.safetensors")
    assert all(
        torch.equal(masks[n], v) for n, v in load_file(tmp_path / "pruned" / "masks.safetensors").items()
    )
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    tensors = load_file(tmp_path / "packed" / "packed.safetensors")
    pruned = sum(one[name].nbytes for name in done.masks)
    packed = sum(v.nbytes for n, v in tensors.items() if n.endswith((".values", ".positions")))
    assert packed == pruned // 2 + pruned // (8 * dtype.itemsize)  # 9/16 in 16 bits
    header = struct.unpack("<Q", (tmp_path / "packed" / "packed.safetensors").read_bytes()[:8])[0]
    rest = sum(value.nbytes for name, value in one.items() if name not in done.masks)
    assert (tmp_path / "packed" / "packed.safetensors").stat().st_size == 8 + header + packed + rest


def test_damage_is_refused(model_folder, words, tmp_path):  # noqa: F811
    source = model_folder()
    prune_model(str(source), tmp_path / "pruned", **options(words))
    pack(tmp_path / "pruned", tmp_path / "packed")
    file = tmp_path / "packed" / "packed.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(Act24Error, match=r"cannot read .*packed.safetensors"):
        read_packed(file.parent)
    for kind in (".positions", ".values", "norm.weight"):
        place = next(n for n in load_file_offsets(whole) if n[0].endswith(kind))
        flipped = bytearray(whole)
        flipped[place[1]] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(Act24Error, match=r"packed\.safetensors is damaged"):
            read_packed(file.parent)
    with pytest.raises(Act24Error, match=r"packed holds packed weights: act24 pack"):
        open_any(file.parent)
    with pytest.raises(Act24Error, match=r"has no masks.safetensors"):
        pack(source, tmp_path / "other")
    masks = read_masks(tmp_path / "pruned")
    name = next(iter(masks.masks))
    write_masks(tmp_path / "pruned", replace(masks, masks={**masks.masks, name: ~masks.masks[name]}))
    with pytest.raises(Act24Error, match=rf"/pruned: {name}: .* pruned are not zero"):
        pack(tmp_path / "pruned", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def load_file_offsets(content):
    """(name, offset in the file) of the tensors of a safetensors file."""
    import json

    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    return [(n, 8 + size + e["data_offsets"][0]) for n, e in header.items() if n != "__metadata__"]
