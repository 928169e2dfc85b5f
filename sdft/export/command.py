"""`python -m sdft export --ckpt last --out my_model`: a checkpoint as a Hugging Face folder.

Reads whole `.ckpt` files and sharded folders, on the CPU and without running what they hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionYesNo, Namespace

from sdft import cli
from sdft.checkpoint_reader import open_checkpoint
from sdft.export.assembly import assemble, widest
from sdft.export.model_card import ModelCard
from sdft.export.model_folder import check_target, write_folder
from sdft.export.run_record import RunRecord
from sdft.models import DTYPES, ModelSource
from sdft.prompts import PLAIN_CHAT_TEMPLATE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def main(args: list[str]) -> int:
    """Export what a command line asks for; returns the exit status.

    Args:
        args: What stands behind `export`.

    Raises:
        ValueError: No checkpoint, one that is damaged or would run code, or a place that is taken.
    """
    options = _parser().parse_args(args)
    out = Path(options.out).absolute()
    check_target(out, options.overwrite)
    record = RunRecord.of(open_checkpoint(_checkpoint_path(options.ckpt, Path(options.root))))
    source = _source(options, record)
    print(f"{options.which} of {record.checkpoint.path}, base model {source.name} …")
    weights = record.checkpoint.weights(options.which)
    stored = widest(weights.values())
    dtype = DTYPES[options.dtype] if options.dtype else stored
    model = assemble(source, weights, record.identity, dtype, options.merge)
    tokenizer = source.load_tokenizer()
    card = ModelCard(
        record,
        options.which,
        _NAMES.get(dtype, str(dtype)),
        converted=dtype != stored,
        sha256=record.checkpoint.sha256(),
        base_model=source.name,
        plain_template=tokenizer.chat_template == PLAIN_CHAT_TEMPLATE,
    )
    write_folder(model, tokenizer, card, out, options.overwrite)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {out}: {size:,} parameters, {card.dtype}, step {record.step}")
    return 0


def _checkpoint_path(name: str, root: Path) -> Path:
    try:
        return cli.find_checkpoint(name, root)
    except ValueError as error:
        raise ValueError(str(error).replace("--ckpt_path", "--ckpt")) from error


def _source(options: Namespace, record: RunRecord) -> ModelSource:
    name = options.model or record.base_model
    revision = options.revision
    if options.model is None and revision is None:
        revision = record.setting("model", "revision")
    try:
        return ModelSource(name, options.trust_remote_code, revision)
    except ValueError as error:
        hint = "" if options.model else " (so the checkpoint calls its base); --model says where"
        raise ValueError(f"{error}{hint}") from error


def _parser() -> Any:
    parser = cli.Parser(prog="sdft export", description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--ckpt",
        "--ckpt_path",
        type=str,
        required=True,
        help="a .ckpt file, a sharded checkpoint's folder, a run's folder, or last",
    )
    parser.add_argument("--out", type=str, required=True, help="the folder to write")
    parser.add_argument(
        "--which", type=Literal["student", "teacher"], default="student", help="the model to write"
    )
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16"] | None,
        default=None,
        help="precision of the weights; that of the checkpoint when unset",
    )
    parser.add_argument(
        "--merge",
        action=ActionYesNo(no_prefix="no-"),
        default=True,
        help="merge adapters into the weights",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="the base model, for its configuration and tokenizer; as the checkpoint says when "
        "unset",
    )
    parser.add_argument(
        "--revision", type=str | None, default=None, help="branch, tag or commit of a hub name"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code that the base model brings"
    )
    parser.add_argument(
        "--root", type=str, default=".", help="where `--ckpt last` looks for the newest run"
    )
    return parser
