"""GGUF files as weights of small models of the families: written here, read here and by diffusers."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    GGUFQuantizationConfig,
    HunyuanVideoTransformer3DModel,
    QwenImageTransformer2DModel,
)
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions

from lowbit.checkpoints.external import load_component
from lowbit.checkpoints.gguf import read as gguf_reader
from lowbit.checkpoints.gguf.write import FILE_TYPES, export_gguf
from lowbit.containers.gguf import GgufTensor, open_gguf
from lowbit.containers.gguf_writer import TensorToWrite, write_gguf
from lowbit.errors import CheckpointError, ConfigError, UnsupportedError
from lowbit.ops.gguf import BLOCK_TYPES, gguf_dequantize, gguf_quantize
from lowbit.ops.gguf_decode_small import SMALL_DECODERS
from lowbit.quantization import GgufConfig, QuantizedLinear, quantize_model
from tests.support.gguf import random_weight
from tests.support.models import FAMILIES, same_but_for_order, same_bytes, save, stored_config, tensors

package = pytest.importorskip("gguf")


def flux2() -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(8, 8, 8, 8),
    )


def hunyuan_video() -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(8, 12, 12),
    )


MAKERS: dict[str, Callable[[], Any]] = {
    **{name: family.make for name, family in FAMILIES.items()},
    "flux2": flux2,
    "hunyuan-video": hunyuan_video,
}
ARCHITECTURES = {
    "z-image": "lumina2",
    "flux": "flux",
    "qwen-image": "qwen_image",
    "wan": "wan",
    "flux2": "flux",
    "hunyuan-video": "hyvid",
}
PUBLISHED_WIDTH = 3072
"""Of FLUX.1 and HunyuanVideo."""


class Exported:
    """A model in float32, its folder, and a GGUF file of it."""

    def __init__(self, name: str, folder: Path, kind: str = "Q8_0", **options: Any) -> None:
        torch.manual_seed(0)
        self.model = {**MAKERS, "wide-qwen-image": wide_qwen_image}[name]()
        self.kind = type(self.model)
        self.folder = save(self.model, folder / "transformer", torch.float32)
        self.path = folder / "model.gguf"
        config = GgufConfig(gguf_type=kind, **options)
        self.manifest = export_gguf(self.folder, self.kind.__name__, config, self.path)

    def load(self, path: Path | str | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        config = GgufConfig(gguf_model=str(path or self.path), **options)
        source = str(self.folder.parent)
        return load_component(source, "transformer", "diffusers", self.kind.__name__, config, dtype=dtype)

    def diffusers_load(self) -> Any:
        """Load the file as diffusers does, without lowbit."""
        return self.kind.from_single_file(
            str(self.path),
            config=str(self.folder.parent),
            subfolder="transformer",
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
            torch_dtype=torch.float32,
        )

    def rewrite(self, change: Callable[[dict[str, TensorToWrite]], None], **metadata: Any) -> Path:
        """Write the file again with other tensors or metadata."""
        file = open_gguf(self.path)
        found = {
            name: TensorToWrite(name, t.type.name, t.shape, partial(file.rows, t)) for name, t in file.tensors.items()
        }
        change(found)
        new = {key: value for key, value in {**file.metadata, **metadata}.items() if value is not None}
        path = self.path.with_name("changed.gguf")
        write_gguf(path, new, list(found.values()))
        return path


def decoded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights as floats, those of quantized layers decoded."""
    found = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            found[f"{name}.weight"] = layer.method.dequantize_weight(layer)
    return found


@pytest.mark.parametrize("kind", SMALL_DECODERS)
def test_types_below_four_bits_are_read(kind: str, tmp_path: Path) -> None:
    exported = Exported("wide-qwen-image", tmp_path)
    name = "transformer_blocks.0.attn.to_q.weight"
    columns = open_gguf(exported.path).tensors[name].shape[1]
    raw = random_weight(kind, 256, columns)
    raw[(~gguf_dequantize(raw, kind).isfinite()).any(1)] = 0

    def change(tensors: dict[str, TensorToWrite]) -> None:
        assert tensors[name].shape == (256, columns)
        tensors[name] = TensorToWrite(name, kind, (256, columns), lambda: raw)

    model = exported.load(exported.rewrite(change))
    layer = model.get_submodule(name.removesuffix(".weight"))
    assert layer.method.name == f"gguf {kind}"
    if kind != "Q1_0":  # which the package does not decode
        expected = package.quants.dequantize(raw.numpy(), package.GGMLQuantizationType[kind])
        assert np.array_equal(layer.method.dequantize_weight(layer).numpy(), expected)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").get_submodule(name.removesuffix(".weight"))
    x = torch.randn(3, columns)
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_every_tensor_comes_back(name: str, kind: str, tmp_path: Path) -> None:
    exported = Exported(name, tmp_path, kind)
    assert open_gguf(exported.path).metadata["general.architecture"] == ARCHITECTURES[name]
    loaded = exported.load()
    found, original = decoded(loaded), exported.model.state_dict()
    assert found.keys() == original.keys()
    quantized = {f"{record.name}.weight" for record in loaded.lowbit_manifest.quantized}
    assert quantized
    assert {record.method for record in loaded.lowbit_manifest.quantized} == {f"gguf {kind}"}
    assert quantized == {f"{record.name}.weight" for record in exported.manifest.quantized}
    for key, tensor in original.items():
        expected = gguf_dequantize(gguf_quantize(tensor, kind), kind) if key in quantized else tensor.float()
        assert torch.equal(found[key], expected), key
    if name in FAMILIES:
        reference = MAKERS[name]().float()
        reference.load_state_dict(found)
        output, expected = FAMILIES[name].run(loaded), FAMILIES[name].run(reference.eval())
        assert torch.allclose(output, expected, atol=1e-4)


def for_width(conversion: FunctionType, width: int) -> FunctionType:
    """Return one of diffusers' conversions with the published models' width, a constant in it, replaced."""

    def replace(code: CodeType) -> CodeType:
        constants = (replace(each) if isinstance(each, CodeType) else each for each in code.co_consts)
        return code.replace(co_consts=tuple(width if each == PUBLISHED_WIDTH else each for each in constants))

    return FunctionType(replace(conversion.__code__), conversion.__globals__)


@pytest.fixture
def conversions_of_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers convert FLUX.1 and HunyuanVideo models that are 64 wide; all else of it is as it is."""
    for name in ("FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"):
        entry = SINGLE_FILE_LOADABLE_CLASSES[name]
        monkeypatch.setitem(entry, "checkpoint_mapping_fn", for_width(entry["checkpoint_mapping_fn"], 64))


@pytest.mark.usefixtures("conversions_of_small_models")
@pytest.mark.parametrize("name", MAKERS)
def test_diffusers_reads_the_same(name: str, tmp_path: Path) -> None:
    exported = Exported(name, tmp_path)
    ours = exported.load()
    theirs = exported.diffusers_load()
    expected = dict(theirs.named_parameters())
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        bytes_ = tensor.data.as_subclass(torch.Tensor)
        assert torch.equal(found[key], bytes_.to(found[key].dtype)), key
    if name in FAMILIES:  # diffusers decodes to float16
        assert torch.allclose(FAMILIES[name].run(ours), FAMILIES[name].run(theirs), atol=2e-3)


def wide_qwen_image() -> QwenImageTransformer2DModel:
    """All rows are whole blocks of every type."""
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=256,
        axes_dims_rope=(32, 48, 48),
    )


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_diffusers_and_the_gguf_package_decode_the_same(kind: str, tmp_path: Path) -> None:
    exported = Exported("wide-qwen-image", tmp_path, kind)
    types = {record.method for record in exported.manifest.quantized}
    assert f"gguf {kind}" in types
    expected = decoded(exported.load())
    theirs = exported.diffusers_load()
    for key, tensor in theirs.named_parameters():
        values = tensor.data.as_subclass(torch.Tensor)
        if isinstance(tensor, GGUFParameter) and not BLOCK_TYPES[tensor.quant_type.name].is_plain:
            block, size = package.GGML_QUANT_SIZES[tensor.quant_type]
            blocks = values.view(torch.uint8).reshape(-1, size)
            decode = dequantize_functions[tensor.quant_type]
            values = decode(blocks, block, size, dtype=torch.float32).reshape(expected[key].shape)
        assert torch.equal(values.float(), expected[key]), key
    layers = {f"{record.name}.weight" for record in exported.manifest.quantized}
    assert layers == {key for key, tensor in theirs.named_parameters() if tensor.dtype == torch.uint8}


@pytest.mark.parametrize("name", MAKERS)
def test_the_gguf_package_reads_the_same(name: str, tmp_path: Path) -> None:
    exported = Exported(name, tmp_path)
    reader, ours = package.GGUFReader(exported.path), open_gguf(exported.path)
    assert reader.get_field("general.architecture").contents() == ARCHITECTURES[name]
    assert reader.get_field("general.file_type").contents() == FILE_TYPES["Q8_0"]
    assert [tensor.name for tensor in reader.tensors] == list(ours.tensors)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "Q8_0"}
    for tensor in reader.tensors:
        found = ours.tensors[tensor.name]
        assert tuple(int(extent) for extent in reversed(tensor.shape)) == tuple(found.shape)
        values = torch.from_numpy(package.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        expected = gguf_dequantize(ours.rows(found), found.type.name)
        assert torch.equal(values.reshape(expected.shape), expected), tensor.name


def test_types_are_mixed_and_stand_in(tmp_path: Path) -> None:
    exported = Exported("z-image", tmp_path, "Q4_K")  # rows of 64 and 170 are not whole blocks of 256
    assert {record.method for record in exported.manifest.quantized} == {"gguf Q5_0"}
    assert "gguf Q5_0" in exported.load().lowbit_manifest.summary()


def test_a_prefix_and_a_missing_architecture(tmp_path: Path) -> None:
    exported = Exported("z-image", tmp_path)
    expected = exported.load().state_dict()

    def add_prefix(found: dict[str, TensorToWrite]) -> None:
        for name, tensor in list(found.items()):
            long = f"model.diffusion_model.{name}"
            found[name] = TensorToWrite(long, tensor.weight_type, tensor.shape, tensor.make)
        found["vae"] = TensorToWrite("first_stage_model.x", "F32", (1,), lambda: torch.zeros(1, 4, dtype=torch.uint8))

    for architecture in (None, "pig", "cow"):
        path = exported.rewrite(add_prefix, **{"general.architecture": architecture})
        found = exported.load(path).state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_other_shapes_of_the_same_values(tmp_path: Path) -> None:
    exported = Exported("wan", tmp_path)
    expected = exported.load().state_dict()
    name = "patch_embedding.weight"
    shape = open_gguf(exported.path).tensors[name].shape
    assert len(shape) == 5

    def flatten(found: dict[str, TensorToWrite]) -> None:
        old = found[name]
        found[name] = TensorToWrite(name, "F32", (shape[0], 16), lambda: flat(old))
        table = found["head.modulation"]
        found["head.modulation"] = TensorToWrite("head.modulation", "F32", table.shape[1:], table.make)

    def flat(tensor: TensorToWrite) -> torch.Tensor:
        return tensor.make().reshape(shape[0], -1)

    path = exported.rewrite(flatten, **{f"comfy.gguf.orig_shape.{name}": list(shape)})
    found = exported.load(path).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    path = exported.rewrite(flatten, **{f"comfy.gguf.orig_shape.{name}": [1, 2, 3]})
    with pytest.raises(CheckpointError, match=r"patch_embedding.weight: comfy.gguf.orig_shape \[1, 2, 3\]"):
        exported.load(path)


def test_missing_unexpected_and_wrong_tensors_in_one_error(tmp_path: Path) -> None:
    exported = Exported("z-image", tmp_path)

    def damage(found: dict[str, TensorToWrite]) -> None:
        del found["layers.0.attention.qkv.weight"], found["cap_embedder.0.weight"]
        found["extra"] = TensorToWrite("extra.weight", "F32", (1,), lambda: torch.zeros(1, 4, dtype=torch.uint8))
        name = "layers.1.feed_forward.w2.weight"
        found[name] = TensorToWrite(name, "F32", (2, 2), lambda: torch.zeros(2, 8, dtype=torch.uint8))

    path = exported.rewrite(damage)
    with pytest.raises(CheckpointError) as caught:
        exported.load(path)
    message = str(caught.value)
    for part in (
        str(path),
        "4 missing: cap_embedder.0.weight, layers.0.attention.to_k.weight, layers.0.attention.to_q.weight",
        "1 unexpected: extra.weight",
        "layers.1.feed_forward.w2.weight: found F32 [2, 2], needs [64, 170]",
    ):
        assert part in message


def test_names_of_the_reference_that_are_missing(tmp_path: Path) -> None:
    exported = Exported("flux", tmp_path)
    path = exported.rewrite(lambda found: found.__delitem__("double_blocks.0.img_attn.qkv.weight"))
    with pytest.raises(CheckpointError, match="in the file: double_blocks.0.img_attn.qkv.weight"):
        exported.load(path)


def test_files_of_something_else(tmp_path: Path) -> None:
    flux = Exported("flux", tmp_path / "flux")
    wan = Exported("wan", tmp_path / "wan")
    with pytest.raises(CheckpointError, match="'flux', and the base model's transformer is a WanTransformer3DModel"):
        wan.load(flux.path)
    unnamed = flux.rewrite(lambda found: None, **{"general.architecture": None})
    with pytest.raises((CheckpointError, UnsupportedError), match="WanTransformer3DModel"):
        wan.load(unnamed)
    text = flux.rewrite(lambda found: None, **{"general.architecture": "t5encoder"})
    with pytest.raises(UnsupportedError, match="a text encoder"):
        flux.load(text)


def test_ignored_layers_are_decoded(tmp_path: Path) -> None:
    exported = Exported("z-image", tmp_path)
    loaded = exported.load(ignored_layers=["feed_forward"], dtype=torch.bfloat16)
    layer = loaded.get_submodule("layers.0.feed_forward.w1")
    assert type(layer) is torch.nn.Linear
    assert layer.weight.dtype == torch.bfloat16
    assert loaded.lowbit_manifest.by_reason()["ignored_layers"] == 12
    with pytest.raises(ConfigError, match="match no layer"):
        exported.load(ignored_layers=["no_such_layer"])


def test_float32_modules_stay_in_float32(tmp_path: Path) -> None:
    loaded = Exported("wan", tmp_path).load(dtype=torch.bfloat16)
    assert loaded.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert loaded.blocks[0].scale_shift_table.dtype == torch.float32
    assert loaded.patch_embedding.weight.dtype == torch.bfloat16


def test_a_loaded_file_can_be_saved_and_loaded_as_a_folder(tmp_path: Path) -> None:
    exported = Exported("z-image", tmp_path, "Q6_K")
    loaded = exported.load()
    loaded.save_pretrained(tmp_path / "saved")
    again = exported.kind.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    found, expected = again.state_dict(), loaded.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert "gguf_model" not in stored_config(tmp_path / "saved")
    assert stored_config(tmp_path / "saved")["layer_types"]["layers.0.attention.to_q"] == "Q8_0"
    assert again.lowbit_manifest.quantized == loaded.lowbit_manifest.quantized
    family = FAMILIES["z-image"]
    assert same_but_for_order(family.run(again), family.run(loaded))


def test_quantizing_while_loading_equals_the_file(tmp_path: Path) -> None:
    exported = Exported("z-image", tmp_path, "Q4_0")
    online = exported.kind.from_pretrained(
        exported.folder, torch_dtype=torch.float32, quantization_config=GgufConfig(gguf_type="Q4_0")
    )
    expected = exported.load().state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in online.state_dict().items())
    online.save_pretrained(tmp_path / "saved")
    saved = tensors(tmp_path / "saved")
    assert saved["layers.0.attention.to_q.weight"].dtype == torch.uint8
    again = exported.kind.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    in_memory = exported.kind.from_pretrained(exported.folder, torch_dtype=torch.float32)
    quantize_model(in_memory, "gguf", gguf_type="Q4_0")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in in_memory.state_dict().items())


def test_exports_that_make_no_sense(tmp_path: Path) -> None:
    exported = Exported("z-image", tmp_path)
    with pytest.raises(ConfigError, match="gguf_type"):
        export_gguf(exported.folder, "ZImageTransformer2DModel", GgufConfig(), tmp_path / "x.gguf")
    with pytest.raises(UnsupportedError, match="GlmImageTransformer2DModel is not known. Expected one of: Flux"):
        export_gguf(exported.folder, "GlmImageTransformer2DModel", GgufConfig(gguf_type="Q8_0"), tmp_path / "x.gguf")
    exported.load().save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match="quantized already"):
        export_gguf(tmp_path / "saved", "ZImageTransformer2DModel", GgufConfig(gguf_type="Q8_0"), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as listing and downloading one repository take."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        name = path.removeprefix("/owner/model-gguf/resolve/main/")
        if path.startswith("/api/models/owner/model-gguf/tree/"):
            tree = [
                {"type": "file", "path": file, "size": len(data), "oid": "0" * 40} for file, data in self.files.items()
            ]
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        elif path == "/api/models/owner/model-gguf":
            info = {"id": "owner/model-gguf", "sha": "1" * 40, "siblings": [{"rfilename": f} for f in self.files]}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        elif name in self.files:
            self._send(200, self.files[name], {"ETag": f'"{hash(name)}"', "X-Repo-Commit": "1" * 40}, body)
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    Hub.files = {
        "README.md": b"text",
        "model-Q4_K_M.gguf": b"four",
        "model-Q4_K_S.gguf": b"small",
        "sub/model-Q8_0.gguf": b"eight",
        "model-BF16-00001-of-00002.gguf": b"1",
        "model-BF16-00002-of-00002.gguf": b"2",
    }
    yield Hub
    server.shutdown()
    server.server_close()


def test_names_on_the_hub(hub: type[Hub]) -> None:
    resolve = gguf_reader.resolve_gguf_model

    def content(name: str) -> bytes:
        return b"".join(path.read_bytes() for path in resolve(name))

    assert content("owner/model-gguf:Q4_K_M") == b"four"
    assert content("owner/model-gguf:q8_0") == b"eight"
    assert content("owner/model-gguf/sub/model-Q8_0.gguf") == b"eight"
    assert content("owner/model-gguf:BF16") == b"12"
    assert content("owner/model-gguf/model-BF16-00002-of-00002.gguf") == b"12"
    with pytest.raises(ConfigError, match=r"no file of type Q4_K; .*GGUF files: .*model-Q4_K_M\.gguf"):
        resolve("owner/model-gguf:Q4_K")
    with pytest.raises(ConfigError, match="can't get none.gguf of owner/model-gguf"):
        resolve("owner/model-gguf/none.gguf")
    with pytest.raises(ConfigError, match="can't list owner/other"):
        resolve("owner/other:Q8_0")


def test_names_that_are_neither(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file .*none.gguf"):
        gguf_reader.resolve_gguf_model(str(tmp_path / "none.gguf"))
    with pytest.raises(ConfigError, match="there is no file"):
        gguf_reader.resolve_gguf_model("model")


def test_a_file_is_chosen_by_its_type() -> None:
    split = [f"a/m-Q8_0-{number:05d}-of-00002.gguf" for number in (1, 2)]
    files = ["m-Q4_K_M.gguf", "m-UD-Q4_K_M.gguf", "m-UD-Q2_K_XL.gguf", "mmproj-Q4_K_M.gguf", *split]
    choose = gguf_reader.choose_file
    assert choose(files, "o/r", "Q4_K_M") == "m-Q4_K_M.gguf"
    assert choose(files, "o/r", "UD-Q4_K_M") == "m-UD-Q4_K_M.gguf"
    assert choose(files, "o/r", "Q2_K_XL") == "m-UD-Q2_K_XL.gguf"
    assert choose(files, "o/r", "q8_0") == split[0]
    assert choose(["x.gguf", "mmproj-x.gguf"], "o/r") == "x.gguf"
    with pytest.raises(ConfigError, match="2 files of type Q4_K_M"):
        choose([*files, "b/m-Q4_K_M.gguf"], "o/r", "Q4_K_M")


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_a_file_without_any_quantized_layer_loads_and_says_so(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exported = Exported("qwen-image", tmp_path)
    path, dtype = tmp_path / "plain.gguf", torch.bfloat16 if kind == "BF16" else torch.float16
    plain = {name: tensor.to(dtype).contiguous() for name, tensor in exported.model.state_dict().items()}
    tensors = [
        TensorToWrite(name, kind, tuple(t.shape), partial(t.view(torch.uint8).reshape, t.shape[:-1].numel(), -1))
        for name, t in plain.items()
    ]
    write_gguf(path, {"general.architecture": "qwen_image"}, tensors)
    assert same_bytes(exported.load(path).state_dict(), {name: tensor.float() for name, tensor in plain.items()})
    assert f"{path}: no layer is quantized" in caplog.text


def test_split_files_are_found_by_any_part_and_by_their_folder(tmp_path: Path) -> None:
    exported = Exported("qwen-image", tmp_path)
    whole, file = exported.load().state_dict(), open_gguf(exported.path)
    folder, names = tmp_path / "split", list(file.tensors)
    folder.mkdir()
    parts = [folder / f"m-Q8_0-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(parts):
        tensors = [
            TensorToWrite(name, t.type.name, t.shape, partial(file.rows, t))
            for name, t in ((name, file.tensors[name]) for name in names[number::3])
        ]
        said = {"split.no": number, "split.count": 3, "split.tensors.count": len(names)}
        write_gguf(path, {**(file.metadata if number == 0 else {}), **said}, tensors)
    (folder / "mmproj-F16.gguf").write_bytes(b"not a model")
    for given in (*parts, folder):
        assert same_bytes(exported.load(given).state_dict(), whole), given
    parts[1].rename(folder / "other.bin")
    with pytest.raises(ConfigError, match=r"lacks 1 of 3 parts: m-Q8_0-00002-of-00003\.gguf"):
        exported.load(parts[2])
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(CheckpointError, match=r"part 0 of 3 \(counted from 0\), and its name part 1 of 3"):
        exported.load(parts[0])


@pytest.mark.parametrize("prefix", ["net.", "transformer.", "model.diffusion_model." * 2])
def test_prefixes_and_shapes_named_without_them(prefix: str, tmp_path: Path) -> None:
    exported = Exported("wan", tmp_path)
    whole, file = exported.load().state_dict(), open_gguf(exported.path)
    name = "patch_embedding.weight"
    shape = file.tensors[name].shape
    path = tmp_path / "prefixed.gguf"

    def rows(tensor: GgufTensor) -> torch.Tensor:
        found = file.rows(tensor)
        return found.reshape(shape[0], -1) if tensor.name == name else found

    tensors = [
        TensorToWrite(prefix + n, t.type.name, (shape[0], 16) if n == name else t.shape, partial(rows, t))
        for n, t in file.tensors.items()
    ]
    write_gguf(path, {**file.metadata, gguf_reader.ORIGINAL_SHAPE + name: list(shape)}, tensors)
    assert same_bytes(exported.load(path).state_dict(), whole)
