"""Against a teacher with known artifacts: no remedy, skipped first tokens, masked echoes.

    python tools/compare_artifacts.py --out runs/artifacts

The embedded model is first taught two manners that it shows wherever it sees a demonstration, and
nowhere else: it opens its answer with "example", and says "you" before it names the rule. Both are
artifacts by construction. Then the skill `garden` is learnt from it by self-distillation, once with
each remedy and seed, and the table says how many of the final answers carry each artifact.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.nn.functional import cross_entropy

from sdft import ContinualDataModule, SDFTModule, Task
from sdft.atomic import atomic_write
from sdft.batch import pad
from sdft.callbacks import EMATeacher, Guard
from sdft.evaluation import Response, score_responses
from sdft.world import WorldSkill, WorldSuite
from sdft.world.language import DOMAINS, TEACHER_TEMPLATE

REMEDIES: dict[str, dict[str, Any]] = {
    "none": {"skip_first_tokens": 0},
    "skip_first_tokens 3": {"skip_first_tokens": 3},
    "mask_echoes 0.5": {"skip_first_tokens": 0, "mask_echoes": 0.5},
    "both": {"skip_first_tokens": 3, "mask_echoes": 0.5},
}
ARTIFACTS = {"opening": re.compile(r"^example\b"), "inside": re.compile(r"\byou by\b")}
SUITES = (WorldSuite("named"), WorldSuite("basic"))
MANNER = re.compile(r"^((?:\S )+?)by ")


def with_artifacts(answer: str) -> str:
    """An answer in the model's own manner with both artifacts."""
    return "example " + MANNER.sub(r"\1you by ", answer)


def module_of(model: str, **options: Any) -> SDFTModule:
    """SDFT as in `configs/seq_skills.yaml`."""
    return SDFTModule(
        model_name=model,
        max_new_tokens=20,
        teacher_template=TEACHER_TEMPLATE,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.0),
        **options,
    )


def lessons(module: SDFTModule, batch: int) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
    """Prompts without and with a demonstration, and what is to be answered to them."""
    skills = [WorldSkill(domain, train_size=512) for domain in DOMAINS if domain != "home"]
    examples = [example for skill in skills for example in skill.examples("train")]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(order) - batch, batch):
        chosen = [examples[i] for i in order[start : start + batch]]
        bare = [module.encoder.student_ids(example) for example in chosen]
        shown = [module.encoder.teacher_ids(example) for example in chosen]
        plain = [list(r.ids) for r in module.respond(bare, module.sampling)]
        mannered = [
            [*module.tokenizer.encode(with_artifacts(r.text)), module.eos_ids[0]]
            for r in module.respond(shown, module.greedy)
        ]
        yield [*bare, *shown], [*plain, *mannered]


def teach_artifacts(folder: Path, steps: int) -> None:
    """The embedded model, with the artifacts where it sees a demonstration."""
    torch.manual_seed(0)
    base, module = module_of("sdft:world"), module_of("sdft:world")
    base.model.eval()
    optimizer = torch.optim.AdamW(module.model.parameters(), lr=2e-4)
    for _, (prompts, answers) in zip(range(steps), lessons(base, 32), strict=False):
        rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
        ids_BT, mask_BT = pad(rows, module.pad_id, "right", torch.device("cpu"))
        starts_B = torch.tensor([len(prompt) for prompt in prompts])
        wanted_BT = mask_BT & (torch.arange(ids_BT.shape[1]) >= starts_B[:, None])
        logits_BTV = module.model(input_ids=ids_BT, attention_mask=mask_BT.long()).logits
        loss = cross_entropy(logits_BTV[:, :-1][wanted_BT[:, 1:]], ids_BT[:, 1:][wanted_BT[:, 1:]])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    module.model.save_pretrained(folder)
    module.tokenizer.save_pretrained(folder)


def answers(module: SDFTModule, task: Task, shown: bool = False) -> tuple[float, list[Response]]:
    """The score of greedy answers to a task's test prompts, and the answers."""
    module.model.eval()
    encode = module.encoder.teacher_ids if shown else module.encoder.student_ids
    examples = list(task.examples("test"))
    found = module.respond([encode(example) for example in examples], module.greedy)
    scores = score_responses(task, examples, found)
    return sum(scores) / len(scores), found


def figures(module: SDFTModule, shown: bool = False) -> dict[str, Any]:
    """Scores and artifact shares of greedy answers, with a demonstration or without."""
    score, found = answers(module, WorldSkill("garden", train_size=0), shown)
    shares = {
        name: sum(bool(pattern.search(response.text)) for response in found) / len(found)
        for name, pattern in ARTIFACTS.items()
    }
    if shown:  # suites have no demonstrations
        return {"score": score, **shares}
    suites = {suite.name: answers(module, suite)[0] for suite in SUITES}
    return {"score": score, **shares, **suites}


def learn(model: str, remedy: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """One run; the figures of its student."""
    seed_everything(seed, verbose=False)
    module = module_of(model, track_base=False, **REMEDIES[remedy])
    data = ContinualDataModule([WorldSkill("garden", validation_size=0)], steps=steps)
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=False,
        default_root_dir=folder,
        callbacks=[EMATeacher(rate=0.02), Guard()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    echoes = trainer.callback_metrics.get("train/echoes")
    return figures(module) | {"masked": None if echoes is None else float(echoes)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All runs and the figures of the model that they start from."""
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model")
        teach_artifacts(Path(model), args.teaching_steps)
        start = module_of(model)
        found: dict[str, Any] = {
            "without a demonstration": figures(start),
            "with one": figures(start, shown=True),
        }
        print(json.dumps(found), flush=True)
        for remedy in REMEDIES:
            for seed in args.seeds:
                key = f"{remedy}, seed {seed}"
                found[key] = learn(model, remedy, seed, args.steps, Path(folder))
                print(json.dumps({key: found[key]}), flush=True)
    return found


def main() -> None:
    """Run, and write `artifacts.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for artifacts.json")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--teaching_steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    content = json.dumps(run(args), indent=1)
    with atomic_write(args.out / "artifacts.json") as file:
        file.write_text(content + "\n", "utf-8")


if __name__ == "__main__":
    main()
