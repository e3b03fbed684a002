"""The `svc export` command."""

from pathlib import Path

import click

from svc.errors import BusyError, NotFoundError
from svc.invocation import json_option, print_json, settings_of
from svc.registry.registry import Registry
from svc.terminal import console
from svc.version import Format, VersionId

_HF, _GGUF = "hf", "gguf"
_TYPES, _K_QUANTS = ("q8_0", "f16"), ("q4_k_m", "q5_k_m", "q6_k")


@click.command()
@click.argument("version")
@click.option(
    "--format",
    "kind",
    type=click.Choice([_GGUF, _HF]),
    required=True,
    help="`gguf` for llama.cpp and Ollama; `hf` for the merged model as a Hugging Face folder.",
)
@click.option("--to", type=click.Path(path_type=Path), help="Output folder.  [default: ./NAME-N]")
@click.option(
    "--type",
    "number_type",
    type=click.Choice([*_TYPES, *_K_QUANTS]),
    default=_TYPES[0],
    show_default=True,
    help="With gguf: data type. q4_k_m, q5_k_m and q6_k need llama.cpp's tool `llama-quantize` on PATH.",
)
@click.option("--modelfile/--no-modelfile", default=True, help="With gguf: whether to write a Modelfile for Ollama.")
@json_option
@click.pass_context
def export(
    ctx: click.Context, version: str, kind: str, to: Path | None, number_type: str, modelfile: bool, as_json: bool
) -> None:
    """Write a version's merged weights for programs other than vLLM."""
    registry = Registry.of(settings_of(ctx))
    version_id = registry.resolve(version)
    out = to or Path(f"{version_id.name}-{version_id.number}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BusyError(f"{out} is not empty", expected="a new or empty folder", todo="choose another folder with --to")
    merged = _merged(registry, version_id)
    if kind == _HF:
        result = _copy(merged, out)
    else:
        from trainer.export.gguf.k_quants import KQuant, export_k_quant
        from trainer.export.gguf.writer import GgufType, export_gguf

        name = f"{version_id.name}-{version_id.number}"
        examples = registry.heldout(version_id)
        if number_type in _K_QUANTS:
            done = export_k_quant(merged, out, name, examples, KQuant(number_type), modelfile=modelfile)
        else:
            done = export_gguf(merged, out, name, examples, type=GgufType(number_type), modelfile=modelfile)
        result = {"file": str(done.file), "bytes": done.bytes, "pre": done.pre, "compared": done.compared}
        console.print(
            f"  {done.compared} held-out examples have the same token ids in llama.cpp (pre-tokenizer {done.pre}) "
            "as with the base's tokenizer; "
            f"no tensor changed by more than {done.worst_change:.4f} of its norm",
            soft_wrap=True,
        )
    if as_json:
        print_json(result)
        return
    console.print(f"wrote {version_id} to {out}")


def _merged(registry: Registry, version: VersionId) -> Path:
    """Return the folder of a version's merged weights, after checking the hashes of its files."""
    if Format.MERGED not in registry.manifest(version).formats:
        raise NotFoundError(
            f"{version} has no merged weights",
            expected=f"a version with format {Format.MERGED}",
            todo="add `merged` to `formats` and run the version's recipe again; training is not repeated",
        )
    registry.verify(version, Format.MERGED)
    return registry.artifact(version, Format.MERGED)


def _copy(merged: Path, out: Path) -> dict[str, object]:
    """Copy the model to a new folder. Unlike the registry's files, the copies are writable.

    The files are moved to their final paths only after all of them have been copied, so an interrupted copy cannot be
    mistaken for a model.
    """
    import shutil

    exists, unfinished = out.exists(), out / ".unfinished"
    unfinished.mkdir(parents=True)
    try:
        for path in merged.iterdir():
            shutil.copyfile(path, unfinished / path.name)
        for path in list(unfinished.iterdir()):
            path.replace(out / path.name)
        unfinished.rmdir()
    except BaseException:
        shutil.rmtree(unfinished if exists else out)
        raise
    return {"folder": str(out), "bytes": sum(path.stat().st_size for path in out.iterdir())}
