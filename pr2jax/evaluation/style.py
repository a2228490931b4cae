"""The report's style sheet: system fonts, light and dark, readable on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fafaf8; --card: #ffffff; --ink: #1d2127; --soft: #646b76; --line: #e3e4e0;
  --accent: #2f6fdb; --right: #1f8a54; --right-back: #e9f6ee; --wrong: #b4472f;
  --wrong-back: #fbefeb;
  --series-a: #2f6fdb; --series-b: #d9730d; --series-c: #1f8a54; --series-d: #c33c54;
  --series-e: #7c53c3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1c2026; --ink: #e4e7ec; --soft: #98a1ae; --line: #2d333c;
    --accent: #79aaff; --right: #6bcf9a; --right-back: #1a2e25; --wrong: #f0957d;
    --wrong-back: #35221d;
    --series-a: #79aaff; --series-b: #ffab5e; --series-c: #6bcf9a; --series-d: #ff8095;
    --series-e: #b79cf5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 74rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { margin: 0; font-size: 1.9rem; font-weight: 650; letter-spacing: -0.015em; }
h2 { margin: 0 0 0.8rem; font-size: 1.2rem; font-weight: 620; }
h4 { margin: 0 0 0.4rem; font-size: 0.8rem; font-weight: 600; color: var(--soft); }
p { max-width: 48rem; margin: 0 0 0.9rem; }
header p { margin-top: 0.35rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size:
  0.85rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.note, figcaption, caption { color: var(--soft); font-size: 0.875rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap:
  0.9rem; margin: 1.5rem 0; }
.tile, section, .problem { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.tile { padding: 0.9rem 1.1rem; display: flex; flex-direction: column; }
.tile-label { color: var(--soft); font-size: 0.85rem; }
.tile-value { font-size: 1.7rem; font-weight: 620; font-variant-numeric: tabular-nums;
  line-height: 1.3; }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; margin-bottom: 1.2rem; font-size:
  0.9rem; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { padding: 1.3rem 1.4rem; margin-bottom: 1.2rem; }
.scroll { overflow-x: auto; margin-bottom: 0.9rem; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 0.4rem; }
th, td { text-align: left; padding: 0.35rem 1.4rem 0.35rem 0; border-bottom: 1px solid
  var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td.number { white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%),
  1fr)); gap: 1.2rem; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; max-height: 34rem; color: var(--ink); }
figure svg text { fill: currentColor; font-family: system-ui, sans-serif !important; }
.intervals { display: grid; grid-template-columns: max-content 1fr max-content; gap: 0.45rem
  1rem; align-items: center; font-size: 0.9rem; margin-bottom: 0.9rem; }
.track { position: relative; height: 1.1rem; background: var(--paper); border-radius: 4px; }
.range { position: absolute; top: 0.3rem; height: 0.5rem; min-width: 2px; background:
  var(--accent); opacity: 0.35; border-radius: 3px; }
.mean { position: absolute; top: 0.1rem; height: 0.9rem; width: 3px; margin-left: -1.5px;
  background: var(--accent); border-radius: 2px; }
.value { font-variant-numeric: tabular-nums; }
.scale { display: flex; justify-content: space-between; color: var(--soft); font-size: 0.8rem; }
.problem { margin-bottom: 0.9rem; overflow: hidden; }
.prompt { padding: 0.7rem 0.9rem; border-bottom: 1px solid var(--line); display: flex;
  justify-content: space-between; gap: 1rem; }
.answer { color: var(--soft); font-size: 0.85rem; max-width: 50%; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0.9rem; padding: 0.7rem 0.9rem
  0.9rem; }
.pair > div { min-width: 0; }
.response { display: flex; flex-wrap: wrap; gap: 0.2rem 0.8rem; padding: 0.3rem 0.6rem;
  margin-bottom: 0.3rem; border-left: 3px solid; border-radius: 4px; }
.response pre { flex: 1 1 8rem; min-width: 0; max-height: 16rem; overflow-y: auto; }
.response.right { border-color: var(--right); background: var(--right-back); }
.response.wrong { border-color: var(--wrong); background: var(--wrong-back); }
.score { font-size: 0.8rem; font-variant-numeric: tabular-nums; color: var(--soft); }
.reason { flex-basis: 100%; font-size: 0.78rem; color: var(--soft); overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); margin-bottom: 0.6rem; }
@media (max-width: 40rem) {
  .pair, .intervals { grid-template-columns: 1fr; }
  .prompt { flex-direction: column; gap: 0.3rem; }
  .answer { max-width: none; }
}
@media print {
  body { max-width: none; padding: 0; }
  nav { display: none; }
  section, .problem, .tile { break-inside: avoid; }
}
"""
