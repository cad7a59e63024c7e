"""Writes the reference under `docs/reference`, of what the code itself says.

    python docs/generate.py            writes it
    python docs/generate.py --check    exit 1, naming what is not up to date

`grpc.md` is made from `protos/`, `http.md` from the application's OpenAPI schema, `commands.md`
from the command line's parser, `configuration.md` from `ClusterConfig`.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "docs" / "reference"
sys.path.insert(0, str(ROOT))

from cluster import cli  # noqa: E402
from cluster.config import ClusterConfig  # noqa: E402

MODEL = ROOT / "deployments" / "models" / "stdlib-7m"
PROTOS = ("inference", "chat", "common", "replica", "drafter")
NOTE = "<!-- Written by docs/generate.py (`make docs`); do not edit. -->"


def generated_files() -> dict[Path, str]:
    """What each page should hold."""
    pages = {"grpc": grpc(), "http": http(), "commands": commands(), "configuration": settings()}
    return {
        REFERENCE / f"{name}.md": "\n".join(lines).rstrip() + "\n" for name, lines in pages.items()
    }


# ------------------------------------------------------------------------------------- Markdown


def title(text: str, about: str) -> list[str]:
    """The head of a page."""
    return [f"# {text}", "", NOTE, "", about, ""]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table and an empty line; nothing for no rows."""
    lines = ["| " + " | ".join(cell(text) for text in row) + " |" for row in rows]
    if not lines:
        return []
    return [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings), *lines, ""]


def cell(text: str) -> str:
    """One line, with no bar of its own."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def code(text: str) -> str:
    """In backquotes; nothing stays nothing."""
    return f"`{text}`" if text else ""


# ----------------------------------------------------------------------------------------- gRPC


def grpc() -> list[str]:
    """Services, messages and enumerations with the comments that the .proto files have."""
    lines = title(
        "gRPC",
        "`cluster.v1`, from `protos/cluster/v1/`. Clients call `InferenceService` on a router, "
        "which serves reflection and `grpc.health.v1` too; the other services are the cluster's "
        "own.",
    )
    for file in descriptors():
        comments = {
            tuple(place.path): f"{place.leading_comments} {place.trailing_comments}"
            for place in file.source_code_info.location
        }
        lines += [f"## {Path(file.name).name}", ""]
        for index, service in enumerate(file.service):
            lines += [f"### {service.name}", "", cell(comments.get((6, index), "")), ""]
            rows = [
                (
                    f"`{method.name}`",
                    ("stream of " if method.client_streaming else "") + link(method.input_type),
                    ("stream of " if method.server_streaming else "") + link(method.output_type),
                    comments.get((6, index, 2, number), ""),
                )
                for number, method in enumerate(service.method)
            ]
            lines += table(("call", "takes", "answers", "does"), rows)
        for index, message in enumerate(file.message_type):
            lines += message_lines(message, message.name, (4, index), comments)
        for index, enum in enumerate(file.enum_type):
            lines += enum_lines(enum, enum.name, (5, index), comments)
    return lines


def descriptors() -> Iterator[FileDescriptorProto]:
    """The .proto files with their comments, in the order of ``PROTOS``."""
    root = ROOT / "protos"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "descriptors"
        names = [f"cluster/v1/{name}.proto" for name in PROTOS]
        arguments = ["protoc", f"--proto_path={root}", "--include_source_info"]
        if protoc.main([*arguments, f"--descriptor_set_out={out}", *names]) != 0:
            raise SystemExit("protoc failed")
        files = {file.name: file for file in FileDescriptorSet.FromString(out.read_bytes()).file}
    for name in names:
        yield files[name]


def message_lines(
    message: DescriptorProto,
    name: str,
    path: tuple[int, ...],
    comments: Mapping[tuple[int, ...], str],
) -> list[str]:
    """A message, and behind it those inside it."""
    maps = {f".{nested.name}": nested for nested in message.nested_type if nested.options.map_entry}
    rows = []
    for index, field in enumerate(message.field):
        held = [entry for suffix, entry in maps.items() if field.type_name.endswith(suffix)]
        kind = type_of(field)
        if held:
            kind = f"map of {type_of(held[0].field[0])} to {type_of(held[0].field[1])}"
        elif field.label == FieldDescriptorProto.LABEL_REPEATED:
            kind = f"repeated {kind}"
        elif field.proto3_optional:
            kind = f"optional {kind}"
        elif field.HasField("oneof_index"):
            kind = f"{kind}, one of `{message.oneof_decl[field.oneof_index].name}`"
        rows.append(
            (f"`{field.name}`", str(field.number), kind, comments.get((*path, 2, index), ""))
        )
    about = cell(comments.get(path, ""))
    lines = [f"### {name}", "", *([about, ""] if about else [])]
    lines += table(("field", "number", "type", "means"), rows)
    for index, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            inner = (*path, 3, index)
            lines += message_lines(nested, f"{name}.{nested.name}", inner, comments)
    for index, enum in enumerate(message.enum_type):
        lines += enum_lines(enum, f"{name}.{enum.name}", (*path, 4, index), comments)
    return lines


def enum_lines(
    enum: EnumDescriptorProto,
    name: str,
    path: tuple[int, ...],
    comments: Mapping[tuple[int, ...], str],
) -> list[str]:
    """An enumeration."""
    about = cell(comments.get(path, ""))
    rows = [
        (f"`{value.name}`", str(value.number), comments.get((*path, 2, index), ""))
        for index, value in enumerate(enum.value)
    ]
    lines = [f"### {name}", "", *([about, ""] if about else [])]
    return lines + table(("value", "number", "means"), rows)


def type_of(field: FieldDescriptorProto) -> str:
    """A field's type; a message's or enumeration's as a link."""
    if field.type_name:
        return link(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def link(type_name: str) -> str:
    """To a message or enumeration on this page."""
    name = type_name.removeprefix(".cluster.v1.")
    return f"[{name}](#{name.lower().replace('.', '')})"


# ----------------------------------------------------------------------------------------- HTTP


def http() -> list[str]:
    """Paths and bodies of the HTTP API."""
    schema = asyncio.run(openapi())
    lines = title(
        "HTTP",
        "The fields of every body, as `GET /openapi.json` has them. What they mean together, "
        "streams, errors and what is refused: `docs/api.md`.",
    )
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            about = operation.get("description", operation["summary"])
            lines += [f"## `{method.upper()} {path}`", "", cell(about), ""]
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if body is not None:
                lines += [f"Body: {schema_type(body['schema'])}.", ""]
    for name, model in schema["components"]["schemas"].items():
        if name in (
            "HTTPValidationError",
            "ValidationError",
        ):  # FastAPI's; errors here are OpenAI's
            continue
        lines += [f"## {name}", "", cell(model.get("description", "")), ""]
        lines += model_table(model)
    return lines


async def openapi() -> dict[str, Any]:
    """The schema of the application over a router that serves the small model."""
    from transformers import AutoTokenizer

    from cluster.api.app import create_app
    from cluster.rpc.router import RouterServer

    router = RouterServer(
        tokenizer=AutoTokenizer.from_pretrained(MODEL),
        model_name=MODEL.name,
        vocab_size=4096,
        max_model_len=2048,
    )
    schema: dict[str, Any] = create_app(router).openapi()
    return schema


def model_table(model: Mapping[str, Any]) -> list[str]:
    """The properties of an object."""
    required = set(model.get("required", ()))
    rows = []
    for name, field in model.get("properties", {}).items():
        default = "required" if name in required else shown_default(field.get("default"))
        rows.append((f"`{name}`", schema_type(field), default, field.get("description", "")))
    return table(("field", "type", "default", "means"), rows)


def schema_type(field: Mapping[str, Any]) -> str:
    """A JSON schema as a few words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in field:
        return code(str(field["const"]))
    if "enum" in field:
        return ", ".join(code(str(value)) for value in field["enum"])
    for several in ("anyOf", "oneOf", "allOf"):
        if several in field:
            kinds = [schema_type(one) for one in field[several] if one.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {schema_type(field.get('items', {}))}"
    bounds = [
        f"{sign} {field[name]:g}"
        for name, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if name in field
    ]
    return ", ".join([kind, *bounds])


def shown_default(value: Any) -> str:
    """As YAML or JSON would have it; unset is nothing."""
    if value is None or value in ([], {}):
        return ""
    return code(str(value).lower() if isinstance(value, bool) else str(value))


# ------------------------------------------------------------------------------------- commands


def commands() -> list[str]:
    """Every command with its arguments."""
    lines = title(
        "Commands",
        "`dspark COMMAND --help` says the same. Every command takes `--json`: one JSON object on "
        "standard output. The exit status is 0 for success, 2 for bad usage or configuration, else "
        "1.",
    )
    return lines + command_lines(cli.make_parser())


def command_lines(parser: argparse.ArgumentParser) -> list[str]:
    """A parser's arguments, and those of its subcommands."""
    rows, inner = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                inner += [
                    f"## {sub.prog}",
                    "",
                    cell(sub.description or ""),
                    "",
                    *command_lines(sub),
                ]
        elif action.help != argparse.SUPPRESS and action.dest not in ("help", "json", "version"):
            rows.append((argument_name(action), argument_default(action), argument_help(action)))
    return table(("argument", "default", "means"), rows) + inner


def argument_name(action: argparse.Action) -> str:
    """As one writes it."""
    value = action.metavar or action.dest.upper()
    value = " ".join(value) if isinstance(value, tuple) else value
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return code(value)
    takes_value = action.nargs != 0
    return ", ".join(
        code(f"{flag} {value}" if takes_value else flag) for flag in action.option_strings
    )


def argument_default(action: argparse.Action) -> str:
    """What is used without it."""
    if action.required:
        return "required"
    if action.default in (None, False, argparse.SUPPRESS) or action.nargs == 0:
        return ""
    value = action.default
    if isinstance(value, list | tuple):
        value = " ".join(map(str, value))
    return code(str(value))


def argument_help(action: argparse.Action) -> str:
    """Its text, placeholders filled in."""
    values = {**vars(action), "prog": "dspark"}
    return re.sub(
        r"%\((\w+)\)s|%%",
        lambda match: str(values.get(match[1])) if match[1] else "%",
        action.help or "",
    )


# -------------------------------------------------------------------------------- configuration


def settings() -> list[str]:
    """Every key of the `args` of a Serve configuration."""
    schema = ClusterConfig.model_json_schema()
    lines = title(
        "Configuration",
        "The `args` of the application in a Ray Serve configuration (`deployments/local.yaml` has "
        "comments). Unknown keys are refused with the nearest right name.",
    )
    lines += model_table(schema)
    for name, section in schema.get("$defs", {}).items():
        lines += [f"## {name}", "", cell(section.get("description", "")), "", *model_table(section)]
    return lines


def main() -> int:
    """Writes or checks."""
    parser = argparse.ArgumentParser(description="Write docs/reference.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check = parser.parse_args().check
    wanted = generated_files()
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    stale += [path for path in REFERENCE.glob("*") if path not in wanted]
    for path in stale:
        print(f"{'out of date' if check else 'updated'}: {path.relative_to(ROOT)}", file=sys.stderr)
        if not check and path in wanted:
            path.write_text(wanted[path])
        elif not check:
            path.unlink()
    if check and stale:
        print("run `make docs` and commit the result", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
