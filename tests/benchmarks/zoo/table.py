"""The table of a run, as text or Markdown, and its summary."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    ("model", "model"), ("parameters", "parameters"), ("frontend", "front-end"), ("capture_seconds", "capture CPU s"),
    ("transform_seconds", "transform CPU s"), ("layers", "layers"), ("covered", "covered %"), ("outputs", "outputs"),
    ("gradients", "gradients"), ("step", "step"), ("problem", "problem"),
)  # fmt: skip
ENOUGH = 0.95


def complete(row: dict[str, Any]) -> bool:
    """Whether a model passes with more than 95 % of its elements covered."""
    return bool(row.get("passed")) and row.get("covered", 0.0) > ENOUGH


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text; "-" for what was not reached."""
    shown = dict(row)
    for what, key in (("outputs", "output_error"), ("gradients", "gradient_error")):
        errors = [row[f"{key}_{mode}"] for mode in ("train", "eval") if f"{key}_{mode}" in row]
        shown[what] = f"{max(errors):.0e}" if errors else "-"
    shown["step"] = f"{row['step_seconds']:.2f} s" if "step_seconds" in row else "-"
    shown["parameters"] = f"{row['parameters']:,}" if "parameters" in row else "-"
    shown["covered"] = f"{100 * row['covered']:.1f}" if "covered" in row else "-"
    for key in ("capture_seconds", "transform_seconds"):
        shown[key] = f"{row[key]:.2f}" if key in row else "-"
    return [str(shown.get(key, "-")) for key, _ in COLUMNS]


def summary(rows: list[dict[str, Any]]) -> list[list[str]]:
    """For each zoo: models, passed, passed with more than 95 % covered, elements covered of all, median seconds."""
    found = []
    for zoo in dict.fromkeys(row["zoo"] for row in rows):
        own = [row for row in rows if row["zoo"] == zoo]
        reached = [row for row in own if "covered" in row]
        elements = sum(row["parameters"] for row in reached)
        share = sum(row["parameters"] * row["covered"] for row in reached) / elements if elements else 0.0
        slow = max((row.get("transform_seconds", 0.0) for row in own), default=0.0)
        passed, good = sum(bool(row.get("passed")) for row in own), sum(map(complete, own))
        found.append([zoo, str(len(own)), str(passed), str(good), f"{100 * share:.1f}", f"{slow:.1f}"])
    return found


SUMMARY = ("zoo", "models", "passed", "> 95 % covered", "elements covered %", "slowest transform CPU s")


def markdown(rows: list[dict[str, Any]], versions: str, command: str) -> str:
    """The whole run: summary, exceptions with their reasons, one table a zoo."""
    lines = [f"`{command}`", "", versions, "", *_table(SUMMARY, summary(rows)), "", "## Exceptions", ""]
    for row in rows:
        if not complete(row):
            lines.append(f"- {row['zoo']}/{row['model']}: {why(row)}")
    for zoo in dict.fromkeys(row["zoo"] for row in rows):
        own = [cells(row) for row in rows if row["zoo"] == zoo]
        lines += ["", f"## {zoo}", "", *_table([title for _, title in COLUMNS], own)]
    return "\n".join(lines) + "\n"


def why(row: dict[str, Any]) -> str:
    """What keeps a model from being complete."""
    if row["problem"]:
        return str(row["problem"])
    causes = [f"{text} ({count:,} elements)" for text, count in list(row.get("uncovered", {}).items())[:3]]
    return f"{100 * row.get('covered', 0.0):.1f} % covered. " + " ".join(causes)


def causes(rows: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """What parameters are left out for, over all models: (reason, elements, models)."""
    elements: dict[str, int] = {}
    models: dict[str, list[str]] = {}
    for row in rows:
        for reason, count in row.get("uncovered", {}).items():
            elements[reason] = elements.get(reason, 0) + count
            models.setdefault(reason, []).append(row["model"])
    order = sorted(elements, key=lambda reason: -elements[reason])
    return [(reason, elements[reason], ", ".join(models[reason][:6])) for reason in order]


def _table(titles: Any, rows: list[list[str]]) -> list[str]:
    body = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}", *body]
