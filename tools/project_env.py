"""Install one project as a user would, into an environment of its own, and try it.

``python tools/project_env.py gfnet_dynn`` makes ``.envs/gfnet_dynn``, runs a plain
``pip install ./packages/gfnet_dynn`` there, checks the environment, and from another folder imports
the package and asks its ``main.py`` for ``--help``.

Five such environments of their own would take 25 GB, so where ``.venv`` is there, what the project
*declares* (and what that declares, and so on) is hard-linked from it first; pip then finds it
installed. Whatever a project uses without declaring it is missing there, and the try-out fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PROJECTS = sorted(path.parent.name for path in (REPO / "packages").glob("*/pyproject.toml"))

# Runs in the donor environment: prints the distributions in the closure of the requirements given.
CLOSURE = """
import sys
from importlib import metadata
from packaging.requirements import Requirement
seen, todo = {}, [Requirement(text) for text in sys.argv[1:]]
while todo:
    wanted = todo.pop()
    key = (wanted.name.lower().replace("_", "-"), tuple(sorted(wanted.extras)))
    if key in seen:
        continue
    seen[key] = True
    try:
        found = metadata.distribution(wanted.name)
    except metadata.PackageNotFoundError:
        continue
    for text in found.requires or []:
        need = Requirement(text)
        extras = wanted.extras or {""}
        if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras):
            todo.append(need)
print("\\n".join(sorted({name for name, _ in seen})))
"""


def run(*command: str | Path, cwd: Path = REPO) -> str:
    """Run a command and return what it printed; a failure shows everything and ends this."""
    done = subprocess.run([str(c) for c in command], cwd=cwd, text=True, capture_output=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise SystemExit(f"error: {' '.join(map(str, command))} ended with {done.returncode}")
    return done.stdout


def declared(project: str) -> list[str]:
    """The requirements in a project's built metadata, the core's own included."""
    requirements: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in (REPO / "packages" / project, REPO / "shared"):
            wheel_dir = Path(folder) / source.name
            run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheel_dir, source)
            (wheel,) = wheel_dir.glob("*.whl")
            found = metadata.Distribution.at(_unpacked_metadata(wheel))
            requirements += [
                text for text in found.requires or []
                if "extra ==" not in text and not text.startswith("shared-core")
            ]  # fmt: skip
    return requirements


def _unpacked_metadata(wheel: Path) -> Path:
    shutil.unpack_archive(wheel, wheel.parent / "x", format="zip")
    (folder,) = (wheel.parent / "x").glob("*.dist-info")
    return folder


def link_closure(donor: Path, target: Path, requirements: list[str]) -> int:
    """Hard-link the distributions that ``requirements`` need from ``donor`` into ``target``."""
    names = run(donor / "bin" / "python", "-c", CLOSURE, *requirements).split()
    (source_site,) = donor.glob("lib/python3*/site-packages")
    (target_site,) = target.glob("lib/python3*/site-packages")
    linked = 0
    for found in metadata.distributions(path=[str(source_site)]):
        name = found.metadata["Name"].lower().replace("_", "-").replace(".", "-")
        if name not in names or name in ("pip", "setuptools", "wheel"):
            continue
        for file in found.files or []:
            if ".." in file.parts or "__pycache__" in file.parts:
                continue  # console scripts carry the donor's path; nothing here needs them
            place = target_site / file
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                os.link(source_site / file, place)
        linked += 1
    return linked


def main(argv: list[str] | None = None) -> int:
    """Make the environment, install, try."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("project", choices=PROJECTS)
    parser.add_argument("--envs", type=Path, default=REPO / ".envs", help="folder of environments")
    parser.add_argument("--donor", type=Path, default=REPO / ".venv", help="environment to share")
    parser.add_argument("--keep", action="store_true", help="keep an environment that is there")
    args = parser.parse_args(argv)

    env = args.envs.resolve() / args.project
    python = env / "bin" / "python"
    if not (args.keep and python.exists()):
        shutil.rmtree(env, ignore_errors=True)
        run(sys.executable, "-m", "venv", env)
        if (args.donor / "bin" / "python").exists():
            linked = link_closure(args.donor.resolve(), env, declared(args.project))
            print(f"{args.project}: {linked} distributions shared with {args.donor.name}")
    run(
        python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
        "--constraint", REPO / "constraints.txt", REPO / "packages" / args.project,
    )  # fmt: skip
    run(python, "-m", "pip", "check")
    with tempfile.TemporaryDirectory() as elsewhere:
        place = Path(elsewhere)
        where = run(
            python, "-c", f"import {args.project}; print({args.project}.__file__)", cwd=place
        )
        if env not in Path(where.strip()).resolve().parents:
            raise SystemExit(f"error: {args.project} was imported from {where.strip()}, not {env}")
        run(python, "-m", f"{args.project}.main", "--help", cwd=place)
        helped = run(python, REPO / "packages" / args.project / "main.py", "--help", cwd=place)
        if "usage:" not in helped:
            raise SystemExit(f"error: {args.project}/main.py --help printed no usage line")
    print(f"{args.project}: installs, imports, answers --help")
    return 0


if __name__ == "__main__":
    sys.exit(main())
