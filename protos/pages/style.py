"""The look of a page and the document around it; it loads nothing from outside and works without scripts."""

from __future__ import annotations

from lamina.protos.pages import charts

_STYLE = """
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
main{max-width:1060px;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:.1rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;font-weight:650;margin:0 0 .3rem}h3{font-size:.9rem;font-weight:600;margin:0;overflow-wrap:anywhere}
section{margin-top:3rem}p{margin:.3rem 0;max-width:46rem}figure{margin:0}
.muted,.caption,dt,dd small,summary{color:var(--muted)}.caption{font-size:.875rem;line-height:1.45;margin:.2rem 0 .9rem}
.lede{font-size:1.08rem;margin-top:1rem}code,pre{font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:2.5rem}.pair>*{min-width:0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,210px),1fr));gap:1.2rem 1.6rem}
dl{margin:0}.figures{display:grid;grid-template-columns:repeat(4,1fr);gap:1.6rem 2rem;margin-top:2rem}
.by3{grid-template-columns:repeat(3,1fr)}.figures>div{min-width:0}
.figures>div{border-top:2px solid var(--rule);padding-top:.5rem}dt{font-size:.82rem}dd{margin:0;overflow-wrap:anywhere}
.figures dd{font-size:1.45rem;line-height:1.3;font-variant-numeric:tabular-nums}
.figures dd small{display:block;font-size:.82rem;line-height:1.4;margin-top:.15rem}
.facts>div{display:grid;grid-template-columns:minmax(7rem,13rem) 1fr;gap:1rem;padding:.15rem 0}
.wrap{overflow-x:auto}.many{max-height:70vh;overflow-y:auto}.many thead{position:sticky;top:0;background:var(--bg);z-index:1}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--muted);text-align:left;vertical-align:bottom}td,th{padding:.15rem .9rem .15rem 0}
thead th{border-bottom:1px solid var(--rule);padding-bottom:.3rem}td:last-child,th:last-child{padding-right:0}
.ruled td{vertical-align:top;border-bottom:1px solid var(--rule);padding-top:.3rem;padding-bottom:.3rem}
.n,.o{text-align:right;white-space:nowrap}.n+.t{padding-left:1.6rem}
.g{width:44%}td.g{padding-top:0;padding-bottom:0}.heat thead{display:none}
.b{width:8rem;padding-left:1rem}.k{white-space:nowrap}.g:last-child{width:75%}.t{overflow-wrap:anywhere;min-width:6rem}
.run{display:inline-flex;vertical-align:top;gap:.5em;text-align:left;max-width:17rem}
.run span{overflow-wrap:break-word;min-width:0}
.run i{flex:none;width:1.4em;border-top:3px solid var(--c);margin-top:.65em}
.run .d1{border-top-style:dashed}.run .d2{border-top-style:dotted}.run .d3{border-top-style:double}
.q{display:inline-block;width:.72em;height:.72em;background:var(--c);margin:0 .08em;border-radius:1px}
i{print-color-adjust:exact;-webkit-print-color-adjust:exact}.facts dd{font-size:.9rem}
.talk{border-top:1px solid var(--rule);padding:.9rem 0}.talk pre{margin:.1rem 0 .6rem}.talk .pair{gap:0 2.5rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere}.config{background:var(--soft);padding:1rem;border-radius:4px}
summary{cursor:pointer;padding:.3rem 0}
@media (max-width:900px){.figures{grid-template-columns:1fr 1fr}}
@media (max-width:560px){main{padding:1.5rem 1rem}.o{display:none}h1{font-size:1.5rem}
.figures{gap:1.2rem}.figures dd{font-size:1.2rem}
.panels{grid-template-columns:1fr 1fr}.g{width:38%}td,th{padding-right:.55rem}}
@media print{@page{margin:14mm}:root{--bg:#fff}body{font-size:10.5pt}main{max-width:none;padding:0}section{margin-top:1.6rem}
table{font-size:8.5pt}.wrap,.many{overflow:visible}.caption,h2{break-after:avoid}.figures{grid-template-columns:repeat(4,1fr)}
.by3{grid-template-columns:repeat(3,1fr)}
svg[viewBox] text{font-size:14px}.pair{grid-template-columns:1fr 1fr}
.many{max-height:none}figure,tr,.talk,.figures>div{break-inside:avoid}
details::details-content{content-visibility:visible;block-size:auto}.config{background:none;padding:0}}
"""


# Nothing is fetched and nothing runs, whatever got past the escaping.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(title: str, body: str, more: str = "") -> str:
    """A whole HTML document around a title and a body, both of them markup; `more` is CSS of its own."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{charts.STYLE}{_STYLE}{more}</style>'
        f"</head><body><main>\n{body}\n</main></body></html>\n"
    )
