"""The style sheet of the page: one column on a phone, two on a desk, plain in print."""

from __future__ import annotations

__all__ = ["CSS"]

CSS = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--surface);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
"Liberation Sans",sans-serif}
main{max-width:62rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:clamp(1.5rem,1.1rem + 2vw,2.25rem);line-height:1.2;letter-spacing:-.015em;
font-weight:650;margin:.4rem 0 1.5rem;max-width:26em;text-wrap:balance}
h2{font-size:1.3rem;line-height:1.25;letter-spacing:-.01em;font-weight:650;
margin:3.25rem 0 1rem;padding-top:1rem;border-top:1px solid var(--grid)}
h3{font-size:.95rem;font-weight:600;margin:1.5rem 0 .5rem}
p{margin:0 0 .6rem;max-width:44rem}
small{font-size:.82em;color:var(--muted)}
.subject{color:var(--muted);font-size:.875rem;margin:0;overflow-wrap:anywhere}
.subject span::before{content:"·";margin:0 .5em}
.subject span:empty{display:none}
.note,figcaption{color:var(--muted);font-size:.85rem;line-height:1.45}
.lede{color:var(--muted);font-size:.95rem}
figure{margin:0;min-width:0}
figcaption{margin-top:.35rem;max-width:34rem}
figcaption.name{color:inherit;font-size:.8rem;font-weight:500;margin:0 0 .25rem;
overflow-wrap:anywhere}
dl,dd{margin:0}
.tiles{display:flex;flex-wrap:wrap;gap:1px;background:var(--grid);
border:1px solid var(--grid);border-radius:.6rem;overflow:hidden;margin-bottom:1.5rem}
.tiles div{flex:1 1 9.5rem;background:var(--surface);padding:.85rem 1rem;display:flex;
flex-direction:column-reverse;justify-content:flex-end}
.tiles dd{font-size:1.5rem;line-height:1.2;font-weight:650;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;white-space:nowrap}
.tiles dt{color:var(--muted);font-size:.82rem;line-height:1.35;margin-top:.2rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));
gap:1.75rem 2.5rem;align-items:start}
.pair.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),19rem))}
.pair h3{margin-top:.5rem;overflow-wrap:anywhere}
.pair+.pair{margin-top:1.75rem}
.flow{columns:2 25rem;column-gap:2.5rem}
.flow figure{break-inside:avoid;padding-bottom:1.5rem}.flow h3{margin-top:0}
.cells{display:grid;grid-template-columns:repeat(var(--n),minmax(0,15rem));
gap:1.1rem 1.25rem;margin-bottom:.75rem}
.chart{display:block;width:100%;height:auto;overflow:visible}
.pair .chart{max-width:32rem}
.chart *{stroke-linejoin:round}
.chart text{fill:var(--ink)}
.chart image{image-rendering:pixelated}
.swatch{display:inline-block;width:.62em;height:.62em;border-radius:50%;
background:var(--c);margin-right:.45em;border:2px solid var(--c);flex:none;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.swatch.hollow{background:none}
.scroll{overflow-x:auto;margin:0 -1.25rem;padding:0 1.25rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.summary{width:100%;font-size:.9rem}
.summary th,.summary td{padding:.5rem .55rem;text-align:right;vertical-align:top;
white-space:nowrap;border-bottom:1px solid var(--grid);line-height:1.35}
.summary thead th{font-weight:500;color:var(--muted);vertical-align:bottom;
font-size:.82rem}
.summary small{display:block;font-weight:400}
.summary th:first-child{text-align:left;position:sticky;left:-1.25rem;z-index:1;
background:var(--surface);padding-left:0;font-weight:450}
.summary tbody th{white-space:normal;min-width:9rem}
.summary tbody th span{display:flex;align-items:baseline}
.summary .best>*,.summary .best>th:first-child{background:color-mix(in srgb,var(--blue) 8%,var(--surface));
font-weight:600}
.badge{display:inline-block;font-size:.7rem;font-weight:600;line-height:1.3;
padding:.05rem .45rem;margin-left:.95rem;border-radius:1rem;color:var(--surface);
background:var(--blue);white-space:nowrap;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.overlap{font-size:.85rem}
.overlap th{font-weight:450;text-align:left;padding:.2rem .6rem .2rem 0;white-space:nowrap}
.overlap thead th{text-align:center;padding:.2rem;color:var(--muted)}
.overlap th:first-child{position:sticky;left:-1.25rem;background:var(--surface)}
.overlap th span{display:flex;align-items:baseline;gap:.5em}
.overlap th small{min-width:1.2em;text-align:right}
.overlap td{width:2.6rem;min-width:2.2rem;height:1.9rem;text-align:center;
border:1px solid var(--surface);
background:color-mix(in srgb,var(--blue) calc(var(--v)*.6),var(--surface));
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.masks{display:flex;flex-wrap:wrap;gap:1.1rem 1.75rem;margin-bottom:1rem}
.card>div{display:flex;gap:4px}
.card>div>div{display:flex;flex-wrap:wrap;gap:4px;align-content:flex-start}
.mask{background:color-mix(in srgb,var(--muted) 13%,var(--surface));flex:none;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.mask svg{display:block;width:100%;height:100%}
.mask path{fill:none;stroke:var(--c);stroke-width:1;shape-rendering:crispEdges}
.mask span{display:flex;flex-direction:column;align-items:center;
justify-content:center;height:100%;padding:2px;font-size:.66rem;line-height:1.2;
text-align:center;overflow:hidden}
.mask .upright{writing-mode:vertical-rl}
.mask .upright small,.mask .flat small{display:inline}
.mask .flat{flex-direction:row;gap:.5em;padding:0;white-space:nowrap}
.mask span small{display:block;font-size:1em;white-space:nowrap}
details{margin:.35rem 0}
summary{cursor:pointer;font-size:.95rem;padding:.2rem 0}
details[open] summary{margin-bottom:.6rem}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));
gap:.7rem 1.5rem;font-size:.9rem;margin-bottom:1.25rem}
.facts dt,.measures dt{color:var(--muted);font-size:.82rem}
.wide{grid-template-columns:1fr;margin-bottom:.7rem}.facts dd{overflow-wrap:anywhere}
.facts dd span{display:inline-block}
.measures{display:grid;gap:.7rem;font-size:.9rem;max-width:44rem}
@media (max-width:46rem){.cells{grid-template-columns:1fr 1fr}}
@media (max-width:30rem){.cells .chart text{font-size:9.5px!important}
.overlap tbody th{white-space:normal;min-width:9rem}}
@media (max-width:40rem){main{padding-top:1.5rem}
.summary{font-size:.82rem}.summary th,.summary td{padding:.45rem .4rem}
.scroll{padding-left:0}
.summary th:first-child,.overlap th:first-child{left:0;padding-left:1.25rem}
.tiles div{flex-basis:38%}.facts:not(.wide){grid-template-columns:1fr 1fr}.masks{zoom:.8;gap:1.1rem}.key{zoom:.9}.tiles dd{font-size:1.25rem}}
@media print{@page{margin:14mm}
body{font-size:10.5pt}main{max-width:none;padding:0}
h2{break-after:avoid}h3{break-after:avoid}
h3+.note,.lede{break-after:avoid;break-inside:avoid}
figure,.tiles,tr,.overlap,.facts div{break-inside:avoid}
.scroll{overflow:visible;margin:0;padding:0}.summary{font-size:7.6pt}
.summary th,.summary td{padding:.3rem .25rem}.summary tbody th{min-width:0}
th:first-child{position:static!important;background:none!important}
.summary .best>*{background:color-mix(in srgb,var(--blue) 8%,var(--surface))!important}
.badge{font-size:6.5pt;margin-left:1em}
.pair{grid-template-columns:1fr 1fr;gap:1rem 1.5rem}
.flow{columns:2}.cells{grid-template-columns:repeat(4,1fr)}
details:not([open]){display:none}}
"""
