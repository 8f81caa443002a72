"""Requests and answers, as OpenAI defines them and vLLM-Omni extends them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lowbit.inputs.data import SEED_END

Scale = Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=512)]
OutputFormat = Literal["png", "jpeg", "webp"]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Extensions(_Request):
    """Fields that OpenAI's API does not have."""

    width: int | None = Field(None, ge=1, description="Pixels; with height in place of size.")
    height: int | None = Field(None, ge=1, description="Pixels; with width in place of size.")
    negative_prompt: str | None = Field(None, description="What to steer away from.")
    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps. Default: the model's.")
    guidance_scale: Scale | None = Field(None, description="Default: the model's.")
    true_cfg_scale: Scale | None = Field(None, description="Of models that have it, such as Qwen-Image.")
    seed: int | None = Field(
        None, ge=0, lt=SEED_END, description="Of the noise; picture i takes seed + i. Default: a random one."
    )
    timeout_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds from arrival to the result, after which it is 504."
    )
    extra_params: dict[str, bool | int | float | str] | None = Field(
        None, description="Arguments of the pipeline's own, of those the operator allows."
    )
    return_stage_metrics: bool | None = Field(None, description="Answer with times and memory.")


class ImageRequest(Extensions):
    """POST /v1/images/generations."""

    prompt: str = Field(description="What the picture shows.")
    model: Name | None = Field(None, description="The served model's name. Default: that.")
    n: int | None = Field(None, ge=1, description="Pictures. Default: 1.")
    size: Name | None = Field(None, description="WIDTHxHEIGHT, or auto: the model's.")
    response_format: Literal["b64_json", "url", "file"] | None = Field(
        None, description="file: the picture itself, several as a zip. Default: b64_json."
    )
    output_format: OutputFormat | None = Field(None, description="Default: png.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp. Default: 100.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(None, ge=0, le=3, description="Of a stream: previews before the picture.")
    user: Name | None = Field(None, description="The end user; has no effect.")
    safety_identifier: Name | None = Field(None, description="The end user; has no effect.")


class EditRequest(ImageRequest):
    """POST /v1/images/edits, beside the files ``image`` and ``mask``."""

    strength: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="How far to depart from the picture, for models with it."
    )


class TextPart(_Request):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Request):
    """A picture, as a data URL."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Request):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class UserMessage(_Request):
    """The message that is the prompt."""

    role: Literal["user"]
    content: list[Part]
    name: Name | None = None


class ChatRequest(Extensions):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(
        min_length=1, description="The last is the prompt: of the user, text or parts text and image_url."
    )
    model: Name | None = Field(None, description="The served model's name. Default: that.")
    num_outputs_per_prompt: int | None = Field(None, ge=1, description="Pictures in the message. Default: 1.")
    size: Name | None = Field(None, description="WIDTHxHEIGHT, or auto: the model's.")
    modalities: list[Literal["text", "image"]] | None = Field(None, description="Must hold image, if given.")
    output_format: OutputFormat | None = Field(None, description="Default: png.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    strength: float | None = Field(None, ge=0, le=1, allow_inf_nan=False, description="See images/edits.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: dict[str, bool] | None = Field(None, description="include_usage.")
    user: Name | None = Field(None, description="The end user; has no effect.")
    safety_identifier: Name | None = Field(None, description="The end user; has no effect.")
    metadata: dict[str, str] | None = Field(None, description="Has no effect.")


class ImageData(BaseModel):
    """A picture of an answer."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int | None = Field(None, description="Of its noise.")


class TokenDetails(BaseModel):
    """Tokens by kind."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens: of the prompt by the model's tokenizer, of pictures by the transformer's patches."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class ImagesAnswer(BaseModel):
    """The answer of images/generations and images/edits."""

    created: int
    data: list[ImageData]
    output_format: OutputFormat
    size: str
    background: Literal["opaque"] = "opaque"
    usage: Usage | None = None
    safety_identifier: str | None = None
    metrics: dict[str, Any] | None = None


class Model(BaseModel):
    """A model that requests may ask for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lowbit"


class Models(BaseModel):
    """The answer of models."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetails(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a result."""

    error: ErrorDetails
