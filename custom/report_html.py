"""The report as one HTML page: no network, readable on a phone and on paper.

The page is made of the report's record alone (``custom.report``), plus its pictures; the script only adds hover values
and switches curves on and off, everything is there without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from custom.report_dvh import dvh_script, dvh_svg, spoken
from custom.report_pictures import ISODOSE_LINES

__all__ = ["render_html"]

STATUS = {"passed": "pass", "failed": "fail", "not_applicable": "n/a"}


def render_html(record: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        record: :func:`custom.report.make_report`'s, with None for nan.
        pictures: :func:`custom.report_pictures.draw_views`'.
    """
    colours = record["colours"]
    parts = [
        _header(record),
        _messages(record),
        _section("Dose-volume histogram", dvh_svg(record, colours)),
        _section("Dose metrics by structure", _metric_tables(record, colours)),
        _section("Clinical protocol", _protocol(record)),
        _section("Dose distribution", _pictures(record, pictures)),
        _section("Homogeneity and conformity", _indices(record)),
        _section("Comparison with the reference", _comparison(record)) if record["comparison"] else "",
        _section("How this was made", _provenance(record)),
    ]
    title = f"Dose report: {escape(record['case'])}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"{''.join(parts)}<script>{dvh_script(record)}</script></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _number(value: float | None, unit: str = "") -> str:
    """Two or three significant digits suffice for a dose; a dash for what does not apply."""
    if value is None:
        return "&ndash;"
    digits = 3 if unit == "" else 1 if unit == "%" or abs(value) >= 100 else 2
    return f"{value:.{digits}f}"


def _signed(value: float | None, unit: str = "") -> str:
    if value is None:
        return ""
    text = _number(value, unit)
    return f"+{text}" if value > 0 and text.strip("0.") else text.replace("-", "&minus;")


def _margin(value: float | None, unit: str) -> str:
    """Signed; a miss by less than the last digit shows that it is one."""
    text = _signed(value, unit)
    return f"&minus;{-value:.1g}" if value is not None and value < 0 and not text.strip("&minus;0.") else text


def _header(record: Mapping[str, Any]) -> str:
    prescription = ", ".join(f"{escape(roi)} {gy:g}&nbsp;Gy" for roi, gy in record["prescription_gy"].items())
    beams = record["beams"]
    arcs = sum(beam["is_arc"] for beam in beams)
    fields = f"{arcs} arc{'s' * (arcs != 1)}" if arcs else f"{len(beams)} field{'s' * (len(beams) != 1)}"
    met, comparison = record["constraints_met_percent"], record["comparison"]
    tiles = [(f"{_number(met['predicted'], '%')} %", "of applicable limits met")]
    if met.get("reference") is not None:
        tiles.append((f"{_number(met['reference'], '%')} %", "met by the reference"))
    if comparison:
        tiles.append((f"{_number(comparison['mae_body_gy'], 'Gy')} Gy", "mean absolute error in the body"))
        worse = [r for r in record["constraints"] if (r["status"], r["reference_status"]) == ("failed", "passed")]
        tiles.append((str(len(worse)), "limits exceeded that the reference meets"))
    hottest = record["views"][0]["dose_gy"]
    tiles.append((f"{hottest:.1f} Gy", "hottest voxel"))
    cells = "".join(f"<div class=tile><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
    return (
        f'<div class="banner">{escape(record["banner"])}</div><header><h1>{escape(record["case"])}</h1>'
        f"<p>{escape(record['site'])} &middot; {escape(record['technique'])}, {fields} &middot; {prescription}</p>"
        f'<div class="tiles">{cells}</div></header>'
    )


def _messages(record: Mapping[str, Any]) -> str:
    """Warnings stand out; the reader's notes can be unfolded."""
    out = ""
    if record["warnings"]:
        out += '<ul class="warnings">' + "".join(f"<li>{escape(text)}</li>" for text in record["warnings"]) + "</ul>"
    if record["notes"]:
        items = "".join(f"<li>{escape(text)}</li>" for text in record["notes"])
        summary = f"<summary>{len(record['notes'])} note(s) on the input</summary>"
        out += f"<details class=notes>{summary}<ul>{items}</ul></details>"
    return out


def _metric_tables(record: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """One table for targets, one for the rest: predicted, below it the reference and the difference."""
    out = ""
    for title, roles in (("Targets", ("target",)), ("Organs and body", ("organ", "external"))):
        rows = [s for s in record["structures"] if s["role"] in roles]
        if not rows:
            continue
        texts = list(rows[0]["metrics"])
        head = "".join(f"<th>{escape(spoken(text))}</th>" for text in texts)
        body = ""
        for row in rows:
            swatch = f'<i style="background:{colours[row["name"]]}"></i>'
            cells = "".join(_metric_cell(row["metrics"][text], text[text.index("[") + 1 : -1]) for text in texts)
            body += f"<tr><th>{swatch}{escape(row['name'])}</th><td>{_number(row['volume_cc'], 'cc')}</td>{cells}</tr>"
        out += _table(f"<th>{title}</th><th>Volume, cc</th>{head}", body)
    if record["has_reference"]:
        out += "<p class=hint>Small: the reference, and predicted minus reference.</p>"
    return out


def _metric_cell(values: Mapping[str, float | None], unit: str) -> str:
    small = ""
    if values.get("reference") is not None:
        small = f"<small>{_number(values['reference'], unit)} ({_signed(values.get('difference'), unit)})</small>"
    return f"<td>{_number(values['predicted'], unit)}{small}</td>"


def _table(head: str, body: str, css: str = "") -> str:
    return f'<div class=scroll><table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _protocol(record: Mapping[str, Any]) -> str:
    rows = [row for row in record["constraints"] if row["status"] != "not_applicable"]
    absent = [row for row in record["constraints"] if row["status"] == "not_applicable"]
    compared = record["has_reference"]
    head = "<th>Structure</th><th>Result</th><th>Metric</th><th>Limit</th><th>Predicted</th>"
    head += "<th>Reference</th>" * compared + "<th>Margin</th><th>Source</th>"
    body = ""
    for row in rows:
        unit = row["unit"]
        reference = ""
        if compared:
            mark = {"failed": " class=failed", "passed": " class=passed"}.get(row["reference_status"], "")
            reference = f"<td><span{mark}>{_number(row['reference'], unit)}</span></td>"
        note = f"<small>{escape(row['note'])}</small>" if row["note"] else ""
        body += (
            f"<tr><th>{escape(row['structure'])}</th>"
            f'<td><span class="{row["status"]}">{STATUS[row["status"]]}</span>{_condition(row)}</td>'
            f"<td>{escape(spoken(row['metric']))}</td>"
            f"<td>{_limit(row)}</td>"
            f"<td>{_number(row['predicted'], unit)}</td>{reference}<td>{_margin(row['margin'], unit)}</td>"
            f"<td class=text>{escape(row['source'])}{note}</td></tr>"
        )
    failed = sum(row["status"] == "failed" for row in rows)
    text = f"<p>{len(rows)} limits apply: {len(rows) - failed} met, {failed} exceeded, the worst first. "
    text += "Limits marked in the reference are those the clinical plan exceeds as well. " * compared
    if absent:
        names = ", ".join(sorted({escape(row["structure"]) for row in absent}))
        text += f"Not applicable, because not drawn: {names}."
    return text + "</p>" + _table(head, body, "protocol")


def _limit(row: Mapping[str, Any]) -> str:
    """A share of the prescription also in Gy."""
    text = escape(row["limit"]).replace("&lt;=", "&le;").replace("&gt;=", "&ge;")
    return f"{text}<small>{_number(row['limit_value'], 'Gy')} Gy</small>" if "Rx" in row["limit"] else text


def _condition(row: Mapping[str, Any]) -> str:
    """Passed beyond its own limit: by another row, of which one is enough; the note says which."""
    met_by_another = row["status"] == "passed" and row["margin"] < 0
    return f'<small title="{escape(row["note"])}">other side</small>' if met_by_another else ""


def _pictures(record: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]]) -> str:
    top_gy = max(record["prescription_gy"].values())
    chips = "".join(
        f'<span><i style="background:{colour}"></i>{100 * share:.0f}&nbsp;% ({share * top_gy:.1f}&nbsp;Gy)</span>'
        for share, colour in ISODOSE_LINES.items()
    )
    out = f"<p class=chips>Isodoses: {chips}</p>"
    hint = "Dashed: structures, in the colours of the histogram. The cross marks the voxel."
    if record["has_reference"]:
        hint += f" Difference: red too hot, blue too cold, full colour at {0.1 * top_gy:.1f} Gy."
    if not record["has_ct"]:
        hint += " This case came without a CT."
    out += f"<p class=hint>{hint}</p>"
    for view in pictures:
        rows = "".join(f"<div class=planes>{''.join(group)}</div>" for group in _side_by_side(view["rows"]))
        out += f"<div class=view><h3>{escape(view['title'])} ({view['dose_gy']:.1f} Gy)</h3>{rows}</div>"
    return out


def _side_by_side(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The pictures of one dose in one group; of several, those of the same plane, which are of one size."""
    figures = [[_figure(row["title"], plane, png) for plane, png in row["planes"].items()] for row in rows]
    return figures if len(figures) == 1 else [list(group) for group in zip(*figures)]


def _figure(title: str, plane: str, png: str) -> str:
    text = escape(f"{title}, {plane}")
    return f'<figure><img src="data:image/png;base64,{png}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _indices(record: Mapping[str, Any]) -> str:
    head = "<th>Target</th><th>Homogeneity (ICRU 83)</th><th>Conformity (Paddick)</th><th>Conformity (RTOG)</th>"
    body = ""
    for row in record["indices"]:
        keys = ("homogeneity_icru83", "conformity_paddick", "conformity_rtog")
        cells = "".join(_metric_cell(row[key], "") for key in keys)
        body += f"<tr><th>{escape(row['name'])}</th>{cells}</tr>"
    text = (
        "<p class=hint>Homogeneity (D2%&minus;D98%)/D50%, ideal 0; conformity for the isodose of 95 % of the target's "
    )
    return (
        _table(head, body)
        + text
        + "own prescription, ideal 1. Lower targets enclose hotter ones, which lowers theirs.</p>"
    )


def _comparison(record: Mapping[str, Any]) -> str:
    own = record["comparison"]
    text = (
        f"<p>Mean absolute error: {_number(own['mae_body_gy'], 'Gy')} Gy in the body, "
        f"{_number(own['mae_body_above_5gy_gy'], 'Gy')} Gy where the reference exceeds 5 Gy, "
        f"{_number(own['mae_targets_gy'], 'Gy')} Gy in the targets.</p>"
    )
    body = "".join(
        f"<tr><th>{row['percent']:.0f} %</th><td>{row['dose_gy']:.1f}</td><td>{_number(row['dice'])}</td>"
        f"<td>{_number(row['hd95_mm'], 'mm')}</td></tr>"
        for row in own["isodoses"]
    )
    for row in own["gamma"]:
        kind = "local" if row["is_local"] else "global"
        text += (
            f"<p>Gamma {row['dose_percent']:g} %/{row['distance_mm']:g} mm, {kind}, above {row['cutoff_percent']:g} % "
            f"of the maximum: {_number(row['pass_percent'], '%')} % of the voxels pass.</p>"
        )
    return text + _table("<th>Isodose</th><th>Dose, Gy</th><th>Dice</th><th>HD95, mm</th>", body)


def _provenance(record: Mapping[str, Any]) -> str:
    spacing = " &times; ".join(f"{mm:g}" for mm in record["grid"]["spacing_mm"])
    shape = " &times; ".join(map(str, record["grid"]["shape"]))
    facts = {
        "Software": escape(record["software"]),
        "Input": escape(record["input_format"]),
        "Grid": f"{shape} voxels of {spacing} mm",
    }
    if record["uncertainty"]:
        facts["Spread of the samples"] = f"{record['uncertainty']['mean_std_in_body_gy']:.2f} Gy on average in the body"
    facts |= {_label(key): _fact(value) for key, value in record["model"].items()}
    rows = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts.items())
    return f"<dl>{rows}</dl><p class=hint>{escape(record['banner'])}</p>"


def _label(key: str) -> str:
    """``"num_samples"`` -> ``"Samples"``; what a program calls ``name`` is the model's."""
    return {"name": "Model", "num_inference_steps": "Sampling steps", "num_samples": "Samples",
            "weights_sha256": "SHA-256 of the weights"}.get(key, escape(key.replace("_", " ").capitalize()))


def _fact(value: Any) -> str:
    return "none" if value is None or value == [] else escape(str(value))


STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1c2430;background:#f4f6f9;margin:0 auto;
max-width:1180px;padding:0 16px 40px}
.banner{position:sticky;top:0;z-index:2;margin:0 -16px;padding:7px 16px;background:#a61b1b;color:#fff;font-weight:600;
text-align:center}
h1{margin:18px 0 2px;font-size:25px;overflow-wrap:anywhere}h2{font-size:18px;margin:0 0 8px}
h3{font-size:15px;margin:18px 0 4px}
p{margin:4px 0 10px}section{background:#fff;border:1px solid #dde3ea;border-radius:8px;padding:16px;margin:14px 0}
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:10px 0}
.tile{background:#fff;border:1px solid #dde3ea;border-radius:8px;padding:8px 14px;flex:1 1 150px}
.tile b{display:block;font-size:20px}.tile span,.hint,small{color:#5a6675;font-size:12.5px}
.warnings{background:#fff4d6;border:1px solid #e5c25a;border-radius:8px;padding:10px 10px 10px 30px}
.notes{margin:6px 0}.notes ul{margin:6px 0}
.scroll{overflow-x:auto;margin-bottom:10px}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:5px 9px;border-bottom:1px solid #e6ebf0;text-align:right;white-space:nowrap;vertical-align:top}
thead th{font-size:12.5px;color:#5a6675;border-bottom:2px solid #cfd8e1;font-weight:600}
tbody th,thead th:first-child{text-align:left;font-weight:600}
tbody th{position:sticky;left:0;background:#fff}
td small{display:block;white-space:nowrap}.protocol :is(td,th):is(:nth-child(2),:nth-child(3)){text-align:left}
.protocol .text,.protocol th:last-child{white-space:normal;text-align:left;min-width:230px;font-size:12.5px}
.text small{white-space:normal}
.passed,.failed,.not_applicable{padding:1px 7px;border-radius:9px}
.passed{background:#dff3e4;color:#145a2a}.failed{background:#fbdcdc;color:#8f1414;font-weight:600}
i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
svg{width:100%;height:auto;display:block;touch-action:pan-y}svg path{stroke-width:2;stroke-linejoin:round}
svg .grid{stroke:#e3e8ee;stroke-width:1}
svg text{font-size:12px;fill:#5a6675}.mid{text-anchor:middle}.end{text-anchor:end}
svg .limit{stroke:#fff;stroke-width:1}svg .band{stroke:none;opacity:.16}
svg .cursor{stroke:#1c2430;stroke-width:1;stroke-dasharray:2 3}
.keys{display:grid;grid-template-columns:repeat(auto-fill,minmax(235px,1fr));gap:2px 14px;font-size:13px;margin-top:8px}
.keys label{display:flex;align-items:center;white-space:nowrap}.keys input{margin:0 6px 0 0}
.keys output{margin-left:auto;font-variant-numeric:tabular-nums;color:#5a6675}
.chips span{white-space:nowrap;margin-right:14px;font-size:13px}
.planes{display:flex;flex-wrap:wrap;gap:6px;align-items:flex-start;margin-bottom:6px}
.planes figure{flex:1 1 250px;max-width:400px;min-width:0;margin:0}
.planes img{display:block;width:100%;height:auto;border-radius:4px;background:#000}
figcaption{font-size:12.5px;color:#5a6675}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 16px;margin:0 0 10px}
dt{color:#5a6675}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:600px){body{padding:0 8px 24px;font-size:14px}.banner{margin:0 -8px}section{padding:10px}
th,td{padding:4px 5px;font-size:12.5px}svg text{font-size:22px}
.protocol .text,.protocol thead th:last-child{display:none}
tbody th{white-space:normal;overflow-wrap:anywhere;min-width:105px}}
@media print{body{background:#fff;max-width:none;font-size:11px;padding:0}section{border:0;padding:6px 0;margin:0}
.banner{position:static;-webkit-print-color-adjust:exact;print-color-adjust:exact;margin:0}
i,.passed,.failed{-webkit-print-color-adjust:exact;print-color-adjust:exact}tbody th{position:static}
tr,.planes,.tile,svg{break-inside:avoid}h2,h3{break-after:avoid}.keys input,#readout{display:none}
.planes figure{flex-basis:0}.scroll{overflow:visible}th,td{padding:2px 5px}}
""".replace("\n", "")
