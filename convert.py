"""Carry models between this project and others.

    python convert.py export --out_dir=out/quickstart --to=models/quickstart
    python convert.py export --out_dir=out/quickstart --to=models/quickstart.gguf --type=q8_0
    python convert.py import gpt2 --out_dir=out/gpt2
    python convert.py merge --out_dir=out/large --to=out/large_whole

`export` writes a folder that transformers, vLLM and others open, or a GGUF file for llama.cpp and
Ollama. `import` makes a run's folder of another project's checkpoint, which is sampled, scored,
visualised and trained further like any other. `merge` makes one file of what many processes wrote.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cli
import files
from engine import checkpoint, report
from exchange import foreign, gguf_file, hub_folder
from exchange.gguf_file import GGUFType
from model import ModelConfig, require


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's model in the form of another project."""

    out_dir: Path = Path("out/quickstart")
    """Folder of the run."""
    checkpoint: Literal["best", "last"] = "best"
    """Take the checkpoint with the lowest validation loss, or the newest."""
    to: Path
    """Folder to write, in the form of the Hugging Face hub; or a file that ends in .gguf."""
    type: GGUFType = "f32"
    """Type of the matrices in a .gguf file."""
    license: str = ""
    """Licence to name in the model card, such as mit; none is claimed without it."""

    def run(self) -> None:
        is_gguf = self.to.suffix.lower() == ".gguf"
        require(is_gguf or self.type == "f32", "only a .gguf file has a type: let `to` end so")
        require(not is_gguf or not self.license, "a .gguf file has no model card for the license")
        state = checkpoint.load(self.out_dir, self.checkpoint)
        if is_gguf:
            gguf_file.export(state, self.to, self.type)
            print(f"written to {self.to}, with a Modelfile for Ollama beside it")
        else:
            hub_folder.export(state, self.to, self.license)
            print(f"written to {self.to}: for transformers, vLLM and others")


@dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run's folder of another project's checkpoint."""

    source: cli.Positional[Path]
    """A folder of GPT2LMHeadModel or Qwen3ForCausalLM, or its name on the hub, which is gpt2,
    qwen3-0.6b or OWNER/NAME@REVISION; nanoGPT's ckpt.pt; or llm.c's model.bin."""
    out_dir: Path
    """Folder to write."""
    data: Path | None = None
    """Prepared dataset whose tokenizer the model has, if the checkpoint does not tell it."""

    def run(self) -> None:
        state = foreign.read(self.source, self.data)
        config = ModelConfig(**state["model_config"])
        text = f"[model]\n{cli.dump_config(config)}"
        write(self.out_dir, state | {"config": text, "elapsed_seconds": 0.0})


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Make one file of a checkpoint that many processes wrote, without their optimizers."""

    out_dir: Path
    """Folder of the run."""
    checkpoint: Literal["best", "last"] = "best"
    """Take the checkpoint with the lowest validation loss, or the newest."""
    to: Path
    """Folder to write."""

    def run(self) -> None:
        write(self.to, checkpoint.load(self.out_dir, self.checkpoint))


def write(out_dir: Path, state: dict[str, Any]) -> None:
    """Write a run's folder with one checkpoint, and say what to do with it."""
    report.open_folder(out_dir, resume=False).close()
    files.write_text(out_dir / "config.toml", state["config"])
    checkpoint.save(out_dir, state | {"optimizers": []}, ["last", "best"])
    report.print_next(out_dir)


COMMANDS = {"export": Export, "import": Import, "merge": Merge}


def main() -> None:
    """Do what the first argument says."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        print(__doc__)
        return
    names = ", ".join(COMMANDS)
    require(command in COMMANDS, f"convert.py knows {names}: got {command}; see --help")
    cli.parse_config(COMMANDS[command], arguments).run()


if __name__ == "__main__":
    cli.run(main)
