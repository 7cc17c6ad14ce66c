"""``python -m gdn_kernels``: ``demo`` (the default), ``kl``, ``env`` and ``warmup``."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from gdn_kernels import demo, environment, kl, launch

PROGRAM = "python -m gdn_kernels"
COMMANDS = ("demo", "kl", "env", "warmup")


class OneLineParser(argparse.ArgumentParser):
    """Usage errors as one line on stderr, exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message}; see {PROGRAM} --help\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    main_parser = OneLineParser(
        prog=PROGRAM,
        description="Gated Delta Net operators for torch: a demo that checks itself, a KL guard, a warm-up.",
        epilog=f"presets: {'; '.join(f'{name}: {shape}' for name, shape in demo.PRESETS.items())}",
    )
    commands = main_parser.add_subparsers(dest="command", metavar="{demo,kl,env,warmup}")
    demo_parser = commands.add_parser("demo", prog=f"{PROGRAM} demo", help="serve a small model and check it (default)")
    kl_parser = commands.add_parser(
        "kl",
        prog=f"{PROGRAM} kl",
        help="decode and verify against prefill, eager and captured, by the KL of their tokens",
    )
    env_parser = commands.add_parser("env", prog=f"{PROGRAM} env", help="versions, devices, implementations")
    warmup_parser = commands.add_parser("warmup", prog=f"{PROGRAM} warmup", help="build the kernels of a preset")
    for sub in (demo_parser, kl_parser):
        sub.add_argument("--text", metavar="FILE", help="text for the prompts; default: the package's README")
        sub.add_argument("--layers", metavar="N", type=positive, help="blocks of the model; default 2, on a GPU 4")
    for sub in (demo_parser, kl_parser, warmup_parser):
        sub.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(demo.PRESETS)}; default by device")
        sub.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    for sub in (demo_parser, kl_parser, env_parser, warmup_parser):
        sub.add_argument("--json", metavar="FILE", help="write what is printed to FILE as JSON")
    return main_parser


def run_env(options: argparse.Namespace) -> int:
    demo.writable(options.json)
    found = environment.collect()
    print(environment.format_report(found))
    demo.write_json(options.json, found)
    return 0


def run_warmup(options: argparse.Namespace) -> int:
    device = demo.pick_device(options.device)
    name, shape = demo.preset(options.preset, device)
    demo.writable(options.json)
    print(f"preset {name}: {shape}")
    if device.type == "cpu":
        built = launch.WarmupReport(0, 0, 0.0, ())
        print("nothing is to be built: on a CPU the operators are plain PyTorch")
    else:
        progress = demo.Progress()
        built = launch.warmup(shape.shapes(device), device, progress=lambda step: progress(f"warm-up: {step}"))
        progress.clear()
        print(built)
    demo.write_json(
        options.json,
        {
            "preset": name,
            "device": device.type,
            "built": built.built,
            "cached": built.cached,
            "seconds": round(built.seconds, 3),
            "operators": list(built.operators),
        },
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "demo")
    options = parser().parse_args(arguments)
    try:
        if options.command == "env":
            return run_env(options)
        if options.command == "warmup":
            return run_warmup(options)
        run = kl.main if options.command == "kl" else demo.main
        return run(demo.Options(options.text, options.preset, options.layers, options.device, options.json))
    except demo.UsageError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
