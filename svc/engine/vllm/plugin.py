"""Our plugin, which vLLM loads in each of its processes through the entry point `vllm.general_plugins`.

It has no effect if vLLM was not started by this project, because only `svc.engine.vllm.launch` sets the
environment variables that enable it.
"""

import logging
import os
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

INT4_LINEAR_VARIABLE = "TUNESERVE_INT4_LINEAR"
"""Environment variable that is set to 1 for engines that use our 4-bit kernel."""
LORA_VARIABLE = "TUNESERVE_LORA"
"""Environment variable that is set to 1 for engines that apply adapters."""
QUIET_VARIABLE = "TUNESERVE_QUIET_ERRORS"
"""Environment variable that is set to 1 for engines whose log must not contain text from requests."""
EMPTY_TOKENS_VARIABLE = "TUNESERVE_EMPTY_TOKENS"
"""Environment variable that is set to 1 for engines whose clients can request log-probabilities."""
SCALES_VARIABLE = "TUNESERVE_KEEP_SCALES"
"""Environment variable that is set to 1 for engines whose INT8 results must stay correct after an in-place reload."""
_REQUEST_LOGGERS = ("vllm.entrypoints.", "uvicorn.")
"""Loggers of request-handling code. Loggers of the engine core are excluded, because their errors explain why the core
exits."""


def register() -> None:
    """Apply the patches enabled by the environment variables. vLLM may call this function more than once."""
    if os.environ.get(QUIET_VARIABLE) == "1" and not isinstance(logging.getLogRecordFactory(), _QuietRecords):
        logging.setLogRecordFactory(_QuietRecords(logging.getLogRecordFactory()))
    if os.environ.get(INT4_LINEAR_VARIABLE) == "1":
        _register_int4_linear()
    if os.environ.get(LORA_VARIABLE) == "1":
        _apply_no_adapter_to_the_base()
    if os.environ.get(EMPTY_TOKENS_VARIABLE) == "1":
        _show_ids_without_a_token_as_empty()
    if os.environ.get(SCALES_VARIABLE) == "1":
        _keep_scales_of_int8_weights()


class _QuietRecords:
    """Factory for log records that contain the stack trace and the type of an error, but not its message.

    The messages are removed because pydantic and vLLM quote the request in them. vLLM logs errors in `/v1/messages` and
    in streams, and uvicorn logs uncaught errors.

    Args:
        make: the log record factory to wrap.
    """

    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        if not record.name.startswith(_REQUEST_LOGGERS):
            return record
        if isinstance(record.args, tuple):
            record.args = tuple(type(arg).__name__ if isinstance(arg, BaseException) else arg for arg in record.args)
        if record.exc_info and record.exc_info[0]:
            kind, _, trace = record.exc_info
            record.exc_text = "".join(traceback.format_tb(trace)) + kind.__name__
            record.exc_info = None
        return record


def _register_int4_linear() -> None:
    """Add our 4-bit linear kernel to the kernels that vLLM can choose from on a CPU."""
    from vllm.model_executor.kernels.linear import register_linear_kernel
    from vllm.platforms import PlatformEnum

    from svc.engine.vllm.int4_linear import Int4LinearKernel

    register_linear_kernel(Int4LinearKernel, PlatformEnum.CPU, "mp")


@cache  # once per process, however often vLLM calls it
def _apply_no_adapter_to_the_base() -> None:
    """Stop vLLM on a CPU from applying an adapter to base-model requests that share a batch with adapter requests.

    In such a batch, tokens of base-model requests have the adapter slot -1, which vLLM's GPU kernels skip. Its CPU
    kernels take -1 as the index of the last slot and apply the adapter there (vllm-project/vllm#48421).
    Setting the values between the adapter's two matrices to zero for these tokens makes its contribution
    zero.
    """
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops

    shrink = lora_ops.bgmv_shrink

    def bgmv_shrink(
        inputs: Any, lora_b_weights: Any, output_tensor: Any, lora_indices_tensor: Any, scaling: float = 1.0
    ) -> None:
        shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor[lora_indices_tensor < 0] = 0

    lora_ops.bgmv_shrink = torch_ops.bgmv_shrink = bgmv_shrink


@cache
def _show_ids_without_a_token_as_empty() -> None:
    """Make vLLM return an empty token for a token id that its tokenizer does not know.

    A model may have more embedding rows than its tokenizer has tokens: Phi-3 has 32,064 rows for 32,011 tokens. With a
    SentencePiece vocabulary, requesting log-probabilities for such an id crashes vLLM 0.32's output handler, and thus
    the HTTP front end for all clients. Any client can request them with `logprob_token_ids`.
    """
    from vllm.tokenizers import detokenizer_utils

    restore = detokenizer_utils._restore_leading_spaces

    def restore_leading_spaces(raw_token: str | None, token_str: str, marker: str) -> str:
        restored: str = restore(raw_token or "", token_str, marker)
        return restored

    detokenizer_utils._restore_leading_spaces = restore_leading_spaces


@cache
def _keep_scales_of_int8_weights() -> None:
    """Make vLLM keep the scales of INT8 weights for as long as a oneDNN kernel reads them, including after a reload.

    On a CPU without AMX, the kernel holds a pointer to its layer's scales. A reload in vLLM 0.32 creates a kernel from
    new tensors, copies their values into the layer's existing tensors and frees the new ones, although the kernel still
    points to them. As a result, SmolLM2-135M produced NaN.
    """
    from vllm import _custom_ops

    create = _custom_ops.create_onednn_scaled_mm

    def create_onednn_scaled_mm(weight: Any, weight_scales: Any, *args: Any) -> Any:
        handler = create(weight, weight_scales, *args)
        handler.weight_scales = weight_scales
        return handler

    _custom_ops.create_onednn_scaled_mm = create_onednn_scaled_mm
