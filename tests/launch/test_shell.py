"""Words of scripts, compared with what a shell makes of them."""

import subprocess

import pytest

from fourge.errors import LaunchError
from fourge.launch.shell import commands


@pytest.mark.parametrize(
    "script",
    [
        r"""a 'b c' "d e" f\ g""",
        "a \\\n  b \\\n  --c=d",
        """a --json '{"x": [1, "y"], "z": "it is"}'""",
        r"""a "{\"x\": 1}" '"' "'" """,
        """A='{"k": "v w"}' ; printf "$A" '$A' ${A}""",
        """A=1; printf ${B:-two} "${B:-t w}" ${A}""",
        "a b # comment 'with quote\nc",
        'a "line\\\nbroken" ""',
        "a > log 2>&1 &\n",
        "a 2>/dev/null b",
        "A='x y'; printf $A\"$A\"",
        "a && b || c; d | e",
        r"a \$HOME \\ \" x",
    ],
)
def test_words_are_the_shells(script: str):
    program = "import sys; print(len(sys.argv) - 1, *map(repr, sys.argv[1:]))"
    names = ("a", "b", "c", "d", "e", "printf")
    functions = "".join(f'{name}() {{ show {name} "$@"; }}\n' for name in names)
    bash = f'show() {{ python3 -c \'{program}\' "$@" >> "$OUT"; }}\n{functions}{script}\nwait'
    variables: dict[str, str] = {}
    found = []
    for words in commands(script, variables):
        if "=" in words[0]:
            name, _, value = words[0].partition("=")
            variables[name] = value
        else:
            found.append(f"{len(words)} {' '.join(map(repr, words))}")
    assert sorted(found) == sorted(_of_bash(bash))


def _of_bash(script: str) -> list[str]:
    """What bash passes to each command; 'c' after || and 'd' run too, whatever was before."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        script = script.replace("a && b || c", "a; b; c")
        subprocess.run(
            ["bash", "-c", script], env={"OUT": str(out), "PATH": "/usr/bin:/bin:/usr/local/bin"},
            cwd=folder, check=False, timeout=20,
        )  # fmt: skip
        return out.read_text().splitlines()


@pytest.mark.parametrize(("text", "quote"), [("a 'b", "'"), ('a\nb "c', '"'), ('a "b$', '"')])
def test_unclosed_quotes_are_refused_with_their_line(text: str, quote: str):
    with pytest.raises(
        LaunchError, match=f"the {quote} of line {text.count(chr(10)) + 1} is never"
    ):
        list(commands(text, {}))


def test_substitutions_stay_as_they_are():
    assert list(commands('a $(nproc --all) ${X} $Y "$(date)"', {})) == [
        ["a", "$(nproc", "--all)", "${X}", "$Y", "$(date)"]
    ]


def test_placeholders_are_words():
    assert list(commands("a --addr <MASTER_IP>:5000 < file", {})) == [
        ["a", "--addr", "<MASTER_IP>:5000"]
    ]


def test_fences_of_markdown_are_left_out():
    assert list(commands("```bash\na b\n```\n", {})) == [["a", "b"]]


def test_windows_line_ends():
    assert list(commands("a \\\r\n  b\r\n", {})) == [["a", "b"]]
