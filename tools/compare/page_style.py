"""How the report of a comparison looks: one style sheet, light and dark, wide and narrow."""

STYLE = """
:root { color-scheme: light dark; --ink: #17202a; --quiet: #5b6875; --line: #d9e0e6;
  --soft: #f3f6f8; --paper: #fff; --win: #0a7d4b; --win-soft: #e6f5ed; --warn: #9a5b00;
  --warn-soft: #fff4e0; --bad: #b3261e; --heat: 10, 100, 170;
  --g0: #2a6fbb; --g1: #d1702a; --g2: #7a4fb5; --g3: #12888a; --g4: #b03a6b; --g5: #6d7f1f }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --quiet: #98a5b1; --line: #323c46;
  --soft: #1b232b; --paper: #11171d; --win: #4cc98d; --win-soft: #12301f; --warn: #e8b25c;
  --warn-soft: #33270f; --bad: #ff8a80; --heat: 80, 160, 230;
  --g0: #6aa9ee; --g1: #f0995a; --g2: #b594e6; --g3: #4cc3c5; --g4: #e67aa6; --g5: #b3c75a } }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, "Noto Sans CJK SC", sans-serif; color: var(--ink);
  background: var(--paper); max-width: 1360px; margin: 0 auto; padding: 18px 20px 60px;
  overflow-wrap: anywhere }
h1 { font-size: 17px; font-weight: 600; color: var(--quiet); margin: 0 0 12px }
h2 { font-size: 19px; margin: 34px 0 8px; padding-top: 12px; border-top: 1px solid var(--line) }
h3 { font-size: 15px; margin: 18px 0 6px }
p { margin: 6px 0; max-width: 80ch }
.top { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 20px }
.win { background: var(--win-soft); border-left: 5px solid var(--win); border-radius: 6px;
  padding: 14px 18px; align-self: start }
.win.none { background: var(--warn-soft); border-color: var(--warn) }
.win .name { font-size: 25px; line-height: 1.2; font-weight: 700; margin: 2px 0 8px }
.win .small, .small { color: var(--quiet); font-size: 13px }
.cards { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 8px; margin: 12px 0 }
.cards div { background: var(--paper); border-radius: 6px; padding: 7px 10px }
.cards b { display: block; font-size: 19px; font-variant-numeric: tabular-nums }
.cards span { color: var(--quiet); font-size: 12px }
.note { background: var(--warn-soft); border-left: 4px solid var(--warn); padding: 6px 12px;
  max-width: none }
.box { overflow-x: auto; margin: 8px 0; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  overflow-wrap: normal }
th, td { padding: 4px 9px; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; vertical-align: top }
tr:last-child td { border-bottom: 0 }
th { background: var(--soft); font-size: 12.5px; font-weight: 600; color: var(--quiet) }
th.l, td.l { text-align: left }
td.w { white-space: normal; min-width: 170px }
td i { display: block; font-style: normal; font-size: 12px; color: var(--quiet) }
tr.winner td { background: var(--win-soft); font-weight: 600 }
.box .heat { text-align: center; min-width: 30px; padding: 4px 5px }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr));
  gap: 0 22px } .pair h3 { margin-top: 2px }
svg { width: 100%; height: auto; display: block }
svg text { font-size: 12px; fill: var(--quiet) }
svg .win { font-weight: 700; fill: var(--win) }
svg .grid { stroke: var(--line) }
svg .limit { stroke: var(--bad); stroke-dasharray: 5 4; stroke-width: 1.3 }
svg .bar { stroke: var(--quiet); opacity: .55 }
svg .front { fill: none; stroke: var(--quiet); stroke-width: 1.4; stroke-dasharray: 2 3 }
svg .ring { fill: none; stroke: var(--win); stroke-width: 2.5 }
svg .mark { opacity: .82; stroke: var(--paper); stroke-width: 1 }
.legend { display: flex; flex-wrap: wrap; gap: 3px 14px; color: var(--quiet); font-size: 12.5px }
.legend b { display: inline-block; width: 11px; height: 11px; border-radius: 6px;
  margin-right: 5px }
.legend b.square { border-radius: 1px }
.g0 { fill: var(--g0) } .g1 { fill: var(--g1) } .g2 { fill: var(--g2) }
.g3 { fill: var(--g3) } .g4 { fill: var(--g4) } .g5 { fill: var(--g5) }
b.g0 { background: var(--g0) } b.g1 { background: var(--g1) } b.g2 { background: var(--g2) }
b.g3 { background: var(--g3) } b.g4 { background: var(--g4) } b.g5 { background: var(--g5) }
b.plain { background: var(--quiet) }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 14px }
.mistakes figure, figure { margin: 0 }
.mistakes img { width: 132px; height: 132px; border-radius: 4px; background: #f0f0f0 }
figcaption { font-size: 12.5px; color: var(--quiet) } figcaption b { color: var(--ink) }
img.sheet { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px }
pre { background: var(--soft); padding: 10px 14px; border-radius: 6px; overflow-x: auto;
  font-size: 13px; margin: 8px 0 }
details { margin: 8px 0 } summary { cursor: pointer; color: var(--quiet) }
@media (max-width: 900px) { .top { grid-template-columns: minmax(0, 1fr) }
  body { padding: 12px 12px 40px } .win .name { font-size: 21px } svg text { font-size: 17px }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)) } }
@media print { details > * { display: block } }
"""
