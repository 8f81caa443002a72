"""``lowbit serve``: a model behind OpenAI's API."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit import env
from lowbit.cli import options
from lowbit.cli.messages import SHARED, say
from lowbit.errors import ConfigError, expected_one_of
from lowbit.models.embedded import EMBEDDED_NAME
from lowbit.serving.reference_flags import REFUSED_FLAGS, RefusedFlag

if TYPE_CHECKING:
    from lowbit.engine import Omni
    from lowbit.serving.server import Address
    from lowbit.serving.settings import ServerSettings

EXAMPLES = """Examples:

  lowbit serve --quantization int8   # the embedded model, at http://127.0.0.1:8000

  lowbit serve Tongyi-MAI/Z-Image-Turbo --omni -q int8 --host 0.0.0.0 --api-key secret --max-steps 20

  lowbit serve --config server.yaml --port 8080   # options of the command line come before the file's

  lowbit serve -q int8 --max-running 8 --print-config > server.yaml

  curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' -d '{"prompt": "a red circle"}'
"""

_NOT_CONFIG = ("config", "print_config", "api_key", *SHARED)


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Take the options of a YAML file as defaults."""
    if file is not None:
        context.default_map = read_config(file, {each.name or "": each for each in context.command.params})
    return file


def read_config(file: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in a YAML file, by the names of the command's parameters.

    Raises:
        ConfigError: it can't be read, or holds what is no option.
    """
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--config {file}: expected options and their values, got {type(found).__name__}")
    named = {str(name).lstrip("-").replace("-", "_"): value for name, value in found.items()}
    known = [name for name in parameters if name not in {"config", "print_config", "help", "", *SHARED}]
    unknown = [name for name in named if name not in known]
    if unknown:
        raise ConfigError(f"--config {file}: unknown option {', '.join(unknown)}. {expected_one_of(known)}")
    return {name: _as_given(value, parameters[name]) for name, value in named.items() if value is not None}


def _as_given(value: Any, parameter: Any) -> Any:
    """Return a value of YAML as the command line would give it: JSON options as text, several values as a list."""
    if isinstance(value, dict):
        return json.dumps(value)
    if parameter.multiple:
        return value if isinstance(value, list) else [value]
    return value


def more_params() -> list[Any]:
    """Return hidden options that refuse those of vLLM-Omni's that ``lowbit serve`` does not have."""

    def take(**_: Any) -> None:
        pass

    signature = []
    for flag in REFUSED_FLAGS:
        kind = str | None if flag.has_value else bool
        default = None if flag.has_value else False
        option = typer.Option(default, flag.name, hidden=True, expose_value=False, callback=_refuser(flag))
        name = flag.name.lstrip("-").replace("-", "_")
        signature.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind))
        take.__annotations__[name] = kind
    vars(take)["__signature__"] = inspect.Signature(signature)
    single = typer.Typer(add_completion=False)
    single.command()(take)
    return [each for each in typer.main.get_command(single).params if each.name != "help"]


def _refuser(flag: RefusedFlag) -> Callable[[Any], Any]:
    def refuse(value: Any) -> Any:
        if value and value not in flag.neutral:
            takes = f". Accepted: {', '.join(flag.neutral)}" if flag.neutral else ""
            raise ConfigError(f"{flag.name} is not supported: {flag.reason}{takes}")
        return value

    return refuse


def serve(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A folder in diffusers' format or a Hub id. Default: the embedded model.")
    ] = None,
    quantization: options.Quantization = None,
    quantization_config: Annotated[
        str | None,
        typer.Option(
            "--quantization-config",
            "--diffusion-quantization-config",
            help="Method with options, or one per component: JSON, or a file of it.",
        ),
    ] = None,
    ignored_layers: options.IgnoredLayers = None,
    gguf_model: options.GgufModel = None,
    gguf_type: options.GgufType = None,
    comfyui_model: options.ComfyUiModel = None,
    svdquant_model: options.SvdQuantModel = None,
    kernel: options.Kernel = None,
    attention_quantization: Annotated[
        str | None,
        typer.Option("--attention-quantization", "--diffusion-kv-cache-dtype", help=options.ATTENTION_HELP),
    ] = None,
    cache_backend: options.CacheBackend = None,
    cache_config: options.CacheConfig = None,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager/--compile", help="--compile compiles the transformer's blocks.")
    ] = True,
    calibration_prompt: options.CalibrationPrompts = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False,
    vae_use_slicing: Annotated[
        bool, typer.Option("--vae-use-slicing", help="Decode pictures one by one: less memory.")
    ] = False,
    vae_use_tiling: Annotated[
        bool, typer.Option("--vae-use-tiling", help="Decode large pictures in tiles: less memory, other bytes.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api-key", help=f"Requests must bring one; may be given several times. Better: {env.API_KEY}."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option("--served-model-name", help="Name of the model in requests; may be given several times."),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests that advance in turn, step by step.")] = 4,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait; more get 429.")] = 64,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Requests that share a forward. With 1 no picture depends on others.")
    ] = 1,
    step_execution: Annotated[
        bool, typer.Option("--step-execution/--no-step-execution", help="Off: one request after the other.")
    ] = True,
    max_images: Annotated[int, typer.Option(min=1, help="Pictures per request.")] = 10,
    max_generated_image_size: Annotated[
        int, typer.Option("--max-generated-image-size", "--max-pixels", min=1, help="Height times width.")
    ] = 4096 * 4096,
    max_steps: Annotated[int, typer.Option(min=1, help="Denoising steps per request.")] = 200,
    max_prompt_chars: Annotated[int, typer.Option(min=1, help="Characters of a prompt.")] = 32_000,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Size of a request, in 10^6 bytes.")] = 64.0,
    max_input_images: Annotated[int, typer.Option(min=1, help="Pictures that a request brings.")] = 16,
    max_input_pixels: Annotated[int, typer.Option(min=1, help="Height times width of each of them.")] = 8192 * 8192,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds per request, queue included; then 504.")] = 600.0,
    default_sampling_params: Annotated[
        str | None,
        typer.Option(help="Parameters that requests leave out: JSON such as '{\"num_inference_steps\": 8}'."),
    ] = None,
    ignore_field: Annotated[
        list[str] | None,
        typer.Option("--ignore-field", help="A field of requests to overlook, such as temperature; several times."),
    ] = None,
    allow_extra_param: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-extra-param", help="An argument of the pipeline that extra_params may set; several times."
        ),
    ] = None,
    url_ttl: Annotated[float, typer.Option(min=1, help="Seconds that a picture's URL works.")] = 3600.0,
    url_memory_mb: Annotated[float, typer.Option(min=0.001, help="Memory for pictures behind URLs.")] = 256.0,
    public_url: Annotated[
        str | None, typer.Option(help="Of the server, behind a proxy: begins pictures' URLs.")
    ] = None,
    root_path: Annotated[str, typer.Option(help="Prefix of paths that a proxy strips.")] = "",
    allowed_origin: Annotated[
        list[str] | None, typer.Option("--allowed-origin", "--allowed-origins", help="For CORS; several times.")
    ] = None,
    shutdown_timeout: Annotated[float, typer.Option(min=0, help="Seconds to finish requests after SIGTERM.")] = 30.0,
    ssl_certfile: Annotated[str | None, typer.Option(help="Of TLS.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="Of TLS.")] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts to the log, at level info.")
    ] = False,
    omni: Annotated[
        bool, typer.Option("--omni", help="Accepted for vLLM-Omni's command lines; has no effect.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option("--config", is_eager=True, callback=_read_config, help="Options in a YAML file, by their names."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the options as YAML, without keys, and exit.")
    ] = False,
) -> None:
    """Serve a model with OpenAI's API."""
    given = {name: value for name, value in context.params.items() if name not in _NOT_CONFIG}
    if print_config:
        typer.echo(as_yaml(given), nl=False)
        return
    spec = options.quantization_spec(
        quantization,
        quantization_config,
        ignored_layers,
        kernel=kernel,
        gguf_model=gguf_model,
        gguf_type=gguf_type,
        comfyui_model=comfyui_model,
        svdquant_model=svdquant_model,
    )
    settings, address = _settings(context.params), _address(context.params)
    from lowbit.engine import Omni
    from lowbit.serving import server

    sock = server.bind(address)
    with sock:
        loaded = Omni(
            model,
            quantization_config=spec,
            dtype=dtype,
            device=device,
            enforce_eager=enforce_eager,
            calibration_prompts=calibration_prompt or (),
            trust_remote_code=trust_remote_code,
            cache_backend=cache_backend,
            cache_config=options.read_json(cache_config, "--cache-config") if cache_config else None,
            attention_quantization=options.attention_spec(attention_quantization),
        )
        _set_decoder(loaded, vae_use_slicing, vae_use_tiling)
        _run(loaded, settings, address, sock)


def as_yaml(given: Mapping[str, Any]) -> str:
    """Return options as a YAML file that ``--config`` reads."""
    import yaml

    plain = {name: list(value) if isinstance(value, tuple | list) else value for name, value in given.items()}
    text: str = yaml.safe_dump(plain, sort_keys=False)
    return text


def _settings(given: Mapping[str, Any]) -> ServerSettings:
    """Return the settings; raises ``ConfigError`` before the model is loaded."""
    from lowbit.serving.settings import Limits, ServerSettings

    defaults = given["default_sampling_params"]
    key = env.read(env.API_KEY)
    return ServerSettings(
        model_names=tuple(given["served_model_name"] or (given["model"] or EMBEDDED_NAME,)),
        api_keys=(*(given["api_key"] or ()), *([key] if key else ())),
        limits=Limits(
            max_images=given["max_images"],
            max_pixels=given["max_generated_image_size"],
            max_steps=given["max_steps"],
            max_prompt_chars=given["max_prompt_chars"],
            max_body_mb=given["max_body_mb"],
            max_input_images=given["max_input_images"],
            max_input_pixels=given["max_input_pixels"],
            max_timeout_s=given["timeout"],
        ),
        max_running=given["max_running"] if given["step_execution"] else 1,
        max_queue=given["max_queue"],
        max_batch=given["max_batch"],
        default_params=options.read_json(defaults, "--default-sampling-params") if defaults else {},
        ignored_fields=frozenset(given["ignore_field"] or ()),
        extra_params=frozenset(given["allow_extra_param"] or ()),
        url_ttl_s=given["url_ttl"],
        stored_mb=given["url_memory_mb"],
        public_url=given["public_url"],
        allowed_origins=tuple(given["allowed_origin"] or ()),
        root_path=given["root_path"],
        log_prompts=given["log_prompts"],
    )


def _address(given: Mapping[str, Any]) -> Address:
    from lowbit.serving.server import Address

    if (given["ssl_certfile"] is None) != (given["ssl_keyfile"] is None):
        raise ConfigError("--ssl-certfile, --ssl-keyfile: give both or neither")
    for name in ("ssl_certfile", "ssl_keyfile"):
        if given[name] is not None and not Path(given[name]).is_file():
            raise ConfigError(f"--{name.replace('_', '-')}: there is no file {given[name]}")
    return Address(
        host=given["host"],
        port=given["port"],
        shutdown_timeout_s=given["shutdown_timeout"],
        ssl_certfile=given["ssl_certfile"],
        ssl_keyfile=given["ssl_keyfile"],
    )


def _set_decoder(omni: Omni, slicing: bool, tiling: bool) -> None:
    """Have the autoencoder save memory."""
    decoder = getattr(omni.pipeline, "vae", None)
    for option, wanted, method in (
        ("--vae-use-slicing", slicing, "enable_slicing"),
        ("--vae-use-tiling", tiling, "enable_tiling"),
    ):
        if wanted and not hasattr(decoder, method):
            raise ConfigError(f"{option}: {type(decoder).__name__} has no {method}")
        if wanted:
            getattr(decoder, method)()


def _run(omni: Omni, settings: ServerSettings, address: Address, sock: Any) -> None:
    from lowbit.cli.generate import show_load
    from lowbit.serving import server
    from lowbit.serving.app import create_app

    app = create_app(omni, settings)
    url = server.url_of(sock, address)
    name = settings.model_names[0]
    show_load(omni, name)
    say(f"serving     {name} at {url}/v1, documentation at {url}/docs")
    key = " -H 'Authorization: Bearer KEY'" if settings.api_keys else ""
    say(f"keys        {'required' if key else 'none: whoever reaches the address may ask'}")
    body = json.dumps({"prompt": "a large red circle left of a small blue square", "response_format": "file"})
    say(
        f"try         curl {url}/v1/images/generations -H 'Content-Type: application/json'{key} -d '{body}'"
        " --output picture.png"
    )
    if server.run(app, address, sock):
        raise KeyboardInterrupt
