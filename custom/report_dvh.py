"""The dose-volume histogram of the report: an SVG that needs no script, and the script that adds hover values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from custom.dosimetry.dvh import parse_metric

__all__ = ["dvh_script", "dvh_svg", "spoken"]

# Plot area of the DVH in SVG units.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 900, 420, 48, 12, 10, 40
CURVES_AT_FIRST = 14


def dvh_svg(record: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """The histogram with its key; curves of the reference are dashed."""
    doses, curves = record["dvh"]["dose_gy"], record["dvh"]["volume_percent"]
    stop_gy = doses[-1]

    def x(gy: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * gy / stop_gy, 1)

    def y(percent: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - percent / 100), 1)

    step = 10 if stop_gy > 25 else 5 if stop_gy > 12 else 1
    svg = []
    for gy in range(0, int(stop_gy) + 1, step):
        svg.append(
            f'<path class=grid d="M{x(gy)} {y(0)}V{y(100)}"/><text x={x(gy)} y={y(0) + 16} class=mid>{gy}</text>'
        )
    for percent in range(0, 101, 20):
        svg.append(f'<path class=grid d="M{x(0)} {y(percent)}H{x(stop_gy)}"/>')
        svg.append(f"<text x={LEFT - 6} y={y(percent) + 4} class=end>{percent}</text>")
    svg.append(f"<text x={(LEFT + WIDTH) / 2} y={HEIGHT - 6} class=mid>Dose in Gy</text>")
    svg.append(f'<text x=14 y={HEIGHT / 2} class=mid transform="rotate(-90 14 {HEIGHT / 2})">Volume in %</text>')
    shown, keys = _at_first(record), []
    limits = _limit_points(record)
    for number, (name, own) in enumerate(curves.items()):
        colour, hidden = colours[name], "" if name in shown else " style=display:none"
        svg.append(f'<g id=curve{number} stroke="{colour}" fill=none{hidden}>')
        if "lower" in own:
            svg.append(f'<path class=band fill="{colour}" d="{_band(doses, own, x, y)}"/>')
        if "reference" in own:
            svg.append(f'<path stroke-dasharray="6 4" d="{_path(doses, own["reference"], x, y)}"/>')
        svg.append(f'<path d="{_path(doses, own["predicted"], x, y)}"/>')
        for gy, percent, at_most, text in limits.get(name, ()):
            tip = "-5 -9h10z" if at_most else "-5 9h10z"  # upper limits point down and left of it, lower ones up
            mark = f'<path class=limit fill="{colour}" d="M{x(gy)} {y(percent)}l{tip}">'
            svg.append(f"{mark}<title>{escape(text)}</title></path>")
        svg.append("</g>")
        keys.append(
            f"<label><input type=checkbox data-curve={number}{' checked' * (name in shown)}>"
            f'<i style="background:{colour}"></i>{escape(name)} <output id=value{number}></output></label>'
        )
    svg.append(f'<path id=cursor class=cursor d="M0 {y(0)}V{y(100)}" style="display:none"/>')
    legend = "solid: predicted" + (", dashed: reference" if record["has_reference"] else "")
    legend += ", triangles: limits of the protocol (curves should pass below those that point down)"
    if record["uncertainty"]:
        legend += ", band: DVH of the dose minus and plus one standard deviation in every voxel"
    return (
        f"<p class=hint>{legend}. <span id=readout>Point at the curves for values at a dose.</span></p>"
        f'<svg id=dvh viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="Dose-volume histogram">{"".join(svg)}</svg>'
        f"<div class=keys>{''.join(keys)}</div>"
    )


def _limit_points(record: Mapping[str, Any]) -> dict[str, list[tuple[float, float, bool, str]]]:
    """Protocol limits that are a point of a structure's own DVH: structure -> (Gy, % of volume, upper limit?, text)."""
    points: dict[str, list] = {}
    stop_gy = record["dvh"]["dose_gy"][-1]
    own_gy = {s["name"]: s["prescription_gy"] or max(record["prescription_gy"].values()) for s in record["structures"]}
    for row in record["constraints"]:
        name, metric = row["structure"], parse_metric(row["metric"])
        if row["status"] == "not_applicable" or name not in own_gy:
            continue
        if metric.kind == "V" and metric.unit == "%":
            gy, percent = metric.at * (1 if metric.at_unit == "Gy" else own_gy[name] / 100), row["limit_value"]
        elif metric.unit == "Gy" and (metric.kind == "Max" or metric.at_unit == "%"):
            gy, percent = row["limit_value"], metric.at or 0.0
        else:
            continue
        if gy <= stop_gy:
            text = f"{name}: {spoken(row['metric'])} {row['limit']}"
            points.setdefault(name, []).append((gy, percent, row["limit"].startswith("<="), text))
    return points


def _path(doses: Sequence[float], volumes: Sequence[float], x, y) -> str:
    """An SVG path, without the points that lie on a level stretch."""
    points = []
    for n, (gy, percent) in enumerate(zip(doses, volumes)):
        level = 0 < n < len(doses) - 1 and volumes[n - 1] == percent == volumes[n + 1]
        if not level:
            points.append(f"{x(gy)} {y(percent)}")
        if percent <= 0:
            break
    return "M" + "L".join(points)


def _band(doses: Sequence[float], own: Mapping[str, Sequence[float]], x, y) -> str:
    there = [f"{x(gy)} {y(v)}" for gy, v in zip(doses, own["lower"])]
    back = [f"{x(gy)} {y(v)}" for gy, v in zip(doses, own["upper"])][::-1]
    return "M" + "L".join(there + back) + "Z"


def dvh_script(record: Mapping[str, Any]) -> str:
    """The script with its data, the record's curves."""
    curves = [
        {key: [round(v, 1) for v in own[key]] for key in ("predicted", "reference") if key in own}
        for own in record["dvh"]["volume_percent"].values()
    ]
    data = {"dose": record["dvh"]["dose_gy"], "curves": curves, "left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH}
    return f"const DVH={json.dumps(data, separators=(',', ':'))};".replace("</", "<\\/") + SCRIPT


def spoken(metric: str) -> str:
    """``"D95%[Gy]"`` -> ``"D95%, Gy"``."""
    return metric.replace("[", ", ").rstrip("]")


def _at_first(record: Mapping[str, Any]) -> set[str]:
    """Curves shown from the start: targets, then organs with a limit, up to a readable number."""
    limited = {row["structure"].split("-")[0] for row in record["constraints"] if row["status"] != "not_applicable"}
    targets = [s["name"] for s in record["structures"] if s["role"] == "target"]
    organs = [s["name"] for s in record["structures"] if s["role"] == "organ"]
    organs.sort(key=lambda name: name not in limited)
    return set((targets + organs)[:CURVES_AT_FIRST])


SCRIPT = """
(()=>{const svg=document.getElementById('dvh'),cursor=document.getElementById('cursor'),
readout=document.getElementById('readout'),boxes=[...document.querySelectorAll('[data-curve]')],hint=readout.textContent,
stop=DVH.dose[DVH.dose.length-1];
boxes.forEach(b=>b.addEventListener('change',()=>{
document.getElementById('curve'+b.dataset.curve).style.display=b.checked?'':'none'}));
const clear=()=>{cursor.style.display='none';readout.textContent=hint;
boxes.forEach((b,n)=>{document.getElementById('value'+n).textContent=''})};
const show=e=>{const r=svg.getBoundingClientRect(),u=(e.clientX-r.left)/r.width*DVH.width;
const gy=(u-DVH.left)/(DVH.right-DVH.left)*stop;if(gy<0||gy>stop){clear();return}
const k=Math.min(DVH.dose.length-1,Math.round(gy/DVH.dose[1]));const x=DVH.left+(DVH.right-DVH.left)*DVH.dose[k]/stop;
cursor.style.display='';cursor.setAttribute('transform','translate('+x+' 0)');
readout.textContent='At '+DVH.dose[k].toFixed(2)+' Gy: volume in % below'+
(DVH.curves[0].reference?', reference in brackets.':'.');
DVH.curves.forEach((c,n)=>{document.getElementById('value'+n).textContent=c.predicted[k].toFixed(1)+
(c.reference?' ('+c.reference[k].toFixed(1)+')':'')})};
svg.addEventListener('pointermove',show);svg.addEventListener('pointerdown',show);svg.addEventListener('pointerleave',clear);
})();
""".replace("\n", " ")
