"""The report's page, as a Jinja2 template.

A Python module and not a file of its own: Flower packs no templates into an app bundle.
"""

# ruff: noqa: E501, RUF001
TEMPLATE = """\
{# One page, no scripts, nothing from the network. Everything from the run is autoescaped. #}
{% macro chart(svg, caption) %}
{% if svg %}
<figure><div class="scroll">{{ svg }}</div><figcaption>{{ caption }}</figcaption></figure>
{% endif %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>fallow: {{ run.data.name }}, {{ run.net.name }}, seed {{ run.seed }}</title>
<style>
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2024; --muted: #5c6670; --grid: #e3e6ea; --soft: #f4f5f7;
  --grow: #2f6fb7; --consolidate: #c4661f; --free: #2c8a63; --dark: #6a4fa3; --pale: #b9a5dd; --heat: 47 111 183;
  --bad: #b3261e; --bad-soft: #fdeceb; --note: #8a5a00; --note-soft: #fff5df;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e6e9ec; --muted: #9aa4ae; --grid: #2c3238; --soft: #1d2226;
    --grow: #6ea8e6; --consolidate: #e5935a; --free: #5dbb93; --dark: #a58be0; --pale: #67548f; --heat: 110 168 230;
    --bad: #ff8a80; --bad-soft: #3a1d1b; --note: #f0c060; --note-soft: #33290f;
  }
}
@media print {
  :root {
    --paper: #ffffff; --ink: #000000; --muted: #444444; --grid: #dddddd; --soft: #f4f4f4;
    --grow: #2f6fb7; --consolidate: #c4661f; --free: #2c8a63; --dark: #6a4fa3; --pale: #b9a5dd; --heat: 47 111 183;
    --bad: #b3261e; --bad-soft: #ffffff; --note: #8a5a00; --note-soft: #ffffff;
  }
  figure, table, .notice { break-inside: avoid; }
  h2 { break-after: avoid; }
  body { font-size: 10pt; padding: 0; }
  table { font-size: 7.5pt !important; }
  th { font-size: 7pt !important; }
  th, td { padding: .15rem .35rem !important; }
  .wrap { min-width: 7rem !important; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  -webkit-print-color-adjust: exact; print-color-adjust: exact;
}
h1 { font-size: 1.25rem; margin: 0 0 .4rem; color: var(--muted); font-weight: 600; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p { max-width: 48rem; margin: .5rem 0; }
.headline { font-size: 1.3rem; line-height: 1.4; margin: 0 0 1rem; text-wrap: pretty; }
.notice { border-left: .25rem solid var(--note); background: var(--note-soft); padding: .5rem .8rem; }
.notice.bad { border-color: var(--bad); background: var(--bad-soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .7rem 1.5rem; margin: 1.2rem 0; }
.facts div { border-top: 1px solid var(--grid); padding-top: .35rem; }
dt { color: var(--muted); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.terms { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .15rem 1rem; font-size: .88rem; margin: .7rem 0; }
.terms dd { max-width: 44rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; font-size: .85rem; vertical-align: bottom; white-space: normal; }
th[colspan] { text-align: center; }
th:first-child, td:first-child, .left { text-align: left; }
.wrap { white-space: normal; min-width: 9rem; overflow-wrap: anywhere; }
.strong { font-weight: 650; }
.heat td:not(:first-child) { background: rgb(var(--heat) / calc(.45 * var(--at))); text-align: center; min-width: 5.5rem; border: 1px solid var(--paper); }
.heat th:not(:first-child) { text-align: center; }
figure { margin: .8rem 0 1.2rem; }
figcaption { color: var(--muted); font-size: .88rem; max-width: 48rem; margin-top: .3rem; }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .88rem; }
pre { background: var(--soft); padding: .7rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--muted); }
@media (max-width: 40rem) {
  .terms { grid-template-columns: 1fr; gap: 0; }
  .terms dd { margin-bottom: .4rem; }
  .scroll svg { min-width: 38rem; }
  .headline { font-size: 1.12rem; }
}
</style>
</head>
<body>
<h1>fallow: {{ run.data.name }}, {{ run.net.name }}</h1>
<p class="headline">{{ headline }}</p>
{% for kind, text in notices %}
<p class="notice {{ kind }}">{{ text }}</p>
{% endfor %}

<dl class="facts">
<div><dt>Images the server could use</dt><dd>
{% if run.server_data == "none" %}none{% else %}{{ '{:,}'.format(run.server_data_images) }} unlabelled ({{ run.server_data }}){% endif %}
{% if run.prior and run.prior.source == "trained" %}; before the run, {{ '{:,}'.format(run.data.prior_images) }} labelled ones to train the prior model{% endif %}
</dd></div>
<div><dt>New images, only on the devices</dt><dd>{% for count in run.data.part_images %}{{ "{:,}".format(count) }}{{ " + " if not loop.last }}{% endfor %}, on {{ run.data.devices }} devices, {{ run.data.partition }}{% if run.data.alpha is not none %} ({{ run.data.alpha }}){% endif %}</dd></div>
<div><dt>Test images, never used for a decision</dt><dd>{{ "{:,}".format(run.data.test_images) if run.data.test_images else "none" }}</dd></div>
<div><dt>Classes and image shape</dt><dd>{{ run.data.classes | length }} classes, {{ run.data.image_shape | join(" × ") }}</dd></div>
<div><dt>What a device may train (scope)</dt><dd>{{ run.scope }}{% if scope_meaning %}: {{ scope_meaning }}{% endif %}</dd></div>
<div><dt>Net</dt><dd>{{ run.net.name }}{% if run.net.width is not none %}, width {{ run.net.width }}{% endif %}{% if run.prior %}, {{ "{:,}".format(run.prior.params_full) }} parameters{% endif %}</dd></div>
{% if run.prior %}<div><dt>Prior model as {{ run.prior.source }}, before freeing</dt><dd>{{ run.prior.accuracy_test | pct }} on test data, {{ run.prior.accuracy_heldout | pct }} on held-out data; {{ run.prior.seconds | duration }}</dd></div>
{% endif %}
<div><dt>Engine and seed</dt><dd>{{ run.engine }}, seed {{ run.seed }}</dd></div>
<div><dt>Time</dt><dd>{{ run.seconds | duration }}</dd></div>
</dl>

{% if run.steps %}
<h2>Accuracy, step by step</h2>
<div class="scroll"><table>
<thead>
<tr><th rowspan="2">step</th><th colspan="4">on test data</th><th colspan="3">on the devices’ held-out data</th><th rowspan="2" class="left">verdict</th></tr>
<tr><th>prior</th><th>grown</th><th>slim</th><th>change</th><th>prior</th><th>grown</th><th>consolidated</th></tr>
</thead>
<tbody>
{% for step in run.steps %}
<tr><td>{{ step.step }}</td><td>{{ step.prior_accuracy | pct }}</td><td>{{ step.grown_accuracy | pct }}</td><td class="strong">{{ step.slim_accuracy | pct }}</td>
<td>{{ (none if step.slim_accuracy is none or step.prior_accuracy is none else step.slim_accuracy - step.prior_accuracy) | points }}</td>
<td>{{ step.heldout.prior | pct }}</td><td>{{ step.heldout.grown | pct }}</td><td>{{ step.heldout.consolidated | pct }}</td>
<td class="left">{{ "accepted" if step.accepted else "refused" }}</td></tr>
{% endfor %}
</tbody></table></div>
<dl class="terms">
<dt>prior</dt><dd>The global model before the step: what phones already run.</dd>
<dt>grown</dt><dd>After the devices trained the freed filters on their new data and the server averaged their updates.</dd>
<dt>slim</dt><dd>After a share of the filters was freed again and cut out: the model that is exported.</dd>
<dt>held-out data</dt><dd>New data that each device keeps out of training; a grown model worse than the prior on it is refused.</dd>
</dl>

{% endif %}
{% if charts.accuracy %}
<h2>Accuracy, round by round</h2>
{{ chart(charts.accuracy, "A round is one exchange between the server and a sample of the devices. The line is the accuracy of the global model that the round began with, as the devices measure it on their held-out data; single markers are test accuracy. In “grow” freed filters learn, in “consolidate” a set of filters is driven to zero while the rest keeps the function; the last exchange of each only measures. A dotted line begins another attempt with a smaller share. The axis does not start at zero.") }}
{% endif %}

{% if run.accuracy_matrix.rows %}
<h2>What is kept and what is forgotten</h2>
<div class="scroll"><table class="heat">
<thead><tr><th>model after</th>{% for part in run.accuracy_matrix.parts %}<th>{{ part }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in run.accuracy_matrix["values"] %}
<tr><td>{{ run.accuracy_matrix.rows[loop.index0] }}</td>
{%- set shades = heat[loop.index0] %}
{% for value in row %}<td style="--at:{{ '%.2f' | format(shades[loop.index0]) }}">{{ value | pct }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p>Accuracy of every model (row) on every part of the data (column), on {{ run.accuracy_matrix.on }}; the stronger the shade, the higher. Read a column downwards to see whether a part is forgotten.</p>
<dl class="terms">
<dt>ACC {{ run.acc | pct }}</dt><dd>Mean of the last row: how good the last model is on all parts.</dd>
<dt>BWT {{ run.bwt | points }}</dt><dd>Mean change on each part from when it was learnt to the end; below zero, something was lost.</dd>
<dt>forgetting {{ run.forgetting | points }}</dt><dd>Mean distance to the best of all earlier models on each part; below zero, the last model is the best.</dd>
</dl>
{% endif %}

{% if run.prior %}
<h2>What freeing filters cost</h2>
{{ chart(charts.freeing, "To free a filter is to train it to exactly zero, so that it can be cut out or taught anew.") }}
<div class="scroll"><table>
<thead>
<tr><th rowspan="2"></th><th colspan="2">share of filters</th><th colspan="4">held-out accuracy</th><th rowspan="2" class="left">attempts refused</th></tr>
<tr><th>asked for</th><th>freed</th><th>before</th><th>at zero</th><th>cut out</th><th>cost</th></tr>
</thead>
<tbody>
{% for row in freeings %}
<tr><td>{{ row.name }}</td><td>{{ row.asked | pct }}</td><td>{{ row.freed | pct }}</td><td>{{ row.before | pct }}</td><td>{{ row.after | pct }}</td><td>{{ row.after_cut | pct }}</td>
<td class="strong">{{ (none if row.cost is none else row.cost) | points }}</td>
<td class="left">{% for attempt in row.rejected %}{{ attempt.share | pct }} (cost {{ attempt.drop | points }}){{ ", " if not loop.last }}{% else %}none{% endfor %}</td></tr>
{% endfor %}
</tbody></table></div>
<dl class="terms">
<dt>asked for, freed</dt><dd>Share of the filters; kept counts are rounded to multiples of 8 where the width allows, so the two may differ.</dd>
<dt>before … cut out</dt><dd>Held-out accuracy before freeing, with the filters at zero, and without them; the last two should be equal.</dd>
<dt>cost</dt><dd>Accuracy lost from before freeing to after the cut; an attempt that loses more than allowed is refused and a smaller share is tried.</dd>
</dl>
{% endif %}

{% if run.steps %}
<h2>What it moved</h2>
{{ chart(charts.traffic, "Bytes of all messages of a step, all devices together. Dense FedAvg is the usual way: the same devices receive and return all weights in float32, in every round that trains.") }}
<div class="scroll"><table>
<thead>
<tr><th rowspan="2">step</th><th colspan="2">grow</th><th colspan="2">consolidate</th><th rowspan="2">total</th><th rowspan="2">dense FedAvg</th><th rowspan="2">share</th><th rowspan="2">rounds</th><th rowspan="2">time</th><th rowspan="2" class="left">where the time went</th></tr>
<tr><th>up</th><th>down</th><th>up</th><th>down</th></tr>
</thead>
<tbody>
{% for step in run.steps %}
{% set total = step.bytes_up + step.bytes_down %}
<tr><td>{{ step.step }}</td>
{% for phase in ("grow", "consolidate") %}<td>{{ step.bytes[phase].up | size }}</td><td>{{ step.bytes[phase].down | size }}</td>{% endfor %}
<td class="strong">{{ total | size }}</td><td>{{ step.bytes_dense_fedavg | size }}</td><td>{{ (total / step.bytes_dense_fedavg if step.bytes_dense_fedavg else none) | pct(0) }}</td>
<td>{{ step.rounds }}</td><td>{{ step.seconds | duration }}</td>
<td class="left wrap">{% for phase, seconds in step.seconds_by_phase.items() %}{{ phase }} {{ seconds | duration }}{{ ", " if not loop.last }}{% endfor %}</td></tr>
{% endfor %}
</tbody></table></div>
<p>Up is from devices to server; what only measures counts as consolidate. Distillation at the server:
{% for step in run.steps %}step {{ step.step }} {{ step.distillation.kind }}{% if step.distillation.kind != "none" %} ({{ step.distillation.seconds | duration }}){% endif %}{{ ", " if not loop.last }}{% endfor %}.
{% set first = participation | selectattr("step", "equalto", 0) | list %}
{% if first %}The first freeing on the devices moved {{ (first | sum("bytes_up") + first | sum("bytes_down")) | size }} more, which is in none of these totals.{% endif %}
</p>

{% endif %}
{% if run.prior %}
<h2>Where the time went</h2>
<div class="scroll"><table>
<thead><tr><th></th><th>training</th><th>SST</th><th>distillation at the server</th><th>measuring</th><th>export</th><th>in all</th></tr></thead>
<tbody>
{% for row in times %}
<tr><td>{{ row.name }}</td><td>{{ row.train | duration }}</td><td>{{ row.sst | duration }}</td><td>{{ row.distillation | duration }}</td><td>{{ row.measuring | duration }}</td><td>{{ row.export | duration }}</td><td class="strong">{{ row.total | duration }}</td></tr>
{% endfor %}
</tbody></table></div>
<dl class="terms">
<dt>training</dt><dd>The prior at the server; in a step the rounds of “grow”, without the distillation at the server.</dd>
<dt>SST</dt><dd>Selective sparsity training: the first freeing at the server, or the rounds of “consolidate” on the devices.</dd>
<dt>measuring</dt><dd>Rounds in which devices only measure: look, weigh, tally, judge.</dd>
<dt>export</dt><dd>Cutting, ONNX, its comparison with PyTorch, int8.</dd>
</dl>

<h2>How large the models are</h2>
{{ chart(charts.sizes, "Full net: its weights in float32. Slim: without the freed filters, as an ONNX file; int8 stores a weight in one byte.") }}
{% endif %}
{% if run.steps %}
<div class="scroll"><table>
<thead><tr><th>step</th><th>parameters</th><th>kept</th><th>ONNX fp32</th><th>parity</th><th>ONNX int8</th><th>accuracy fp32</th><th>accuracy int8</th><th>agreement</th><th>latency fp32</th><th>latency int8</th></tr></thead>
<tbody>
{% for step in run.steps %}
{% set int8 = step.onnx.int8 if step.onnx else none %}
<tr><td>{{ step.step }}</td><td>{{ "{:,}".format(step.params_slim) }}</td><td>{{ (step.params_slim / step.params_full) | pct(0) }}</td>
{% if step.onnx %}<td>{{ step.onnx.fp32.bytes | size }}</td><td>{{ step.onnx.fp32.max_abs_diff | number(".1e") }}</td>{% else %}<td>–</td><td>–</td>{% endif %}
{% if int8 %}<td>{{ int8.bytes | size }}</td><td>{{ int8.accuracy_fp32 | pct }}</td><td>{{ int8.accuracy_int8 | pct }}</td><td>{{ int8.agreement | pct }}</td><td>{{ int8.latency_ms_fp32 | number(".2f") }} ms</td><td>{{ int8.latency_ms_int8 | number(".2f") }} ms</td>
{% else %}<td>–</td><td>–</td><td>–</td><td>–</td><td>–</td><td>–</td>{% endif %}</tr>
{% endfor %}
</tbody></table></div>
<dl class="terms">
<dt>parity</dt><dd>Largest difference of a logit between ONNX Runtime and PyTorch; up to 1e-4 passes.</dd>
<dt>agreement</dt><dd>Share of images for which fp32 and int8 name the same class.</dd>
<dt>latency</dt><dd>Time to run the model on this machine: compare the two, not with other machines.</dd>
</dl>
{% endif %}

{% if participation %}
<h2>Which devices took part</h2>
<div class="scroll"><table>
<thead><tr><th>phase</th><th>rounds</th><th>asked</th><th>used</th><th>up</th><th>down</th><th>time</th><th class="left">not used, and why</th></tr></thead>
<tbody>
{% for row in participation %}
<tr><td>{{ "step %d, " % row.step if row.step else "first freeing, " }}{{ row.phase }}</td><td>{{ row.rounds }}</td><td>{{ row.devices_asked }}</td><td>{{ row.devices_used }}</td><td>{{ row.bytes_up | size }}</td><td>{{ row.bytes_down | size }}</td><td>{{ row.seconds | duration }}</td>
<td class="left wrap">{% for reason, count in row.declined %}{{ reason }}: {{ count }}{{ ", " if not loop.last }}{% else %}–{% endfor %}</td></tr>
{% endfor %}
</tbody></table></div>
<dl class="terms">
<dt>asked, used</dt><dd>Counted over all rounds and attempts: a device asked in ten rounds counts ten times.</dd>
<dt>look, weigh, judge</dt><dd>Exchanges in which devices train nothing: they measure the grown model and which of its filters matter, and then what freeing cost.</dd>
</dl>
{% set admission = run.admission | default({"late": 0, "abandoned": 0, "refused": [], "mean": "weighted"}) %}
<p>Updates were averaged by the {{ {"weighted": "mean weighted by images", "trimmed": "trimmed mean", "median": "median", "krum": "mean of the nearest (Multi-Krum)"}[admission.mean] }}. Tries at rounds that were abandoned: {{ admission.abandoned }}. Answers that came after their round was over: {{ admission.late }}.{% if run.privacy | default(none) %} The device whose noised updates disclose the most is at epsilon {{ '%.3g' | format(run.privacy.epsilon) }} (delta {{ '%g' | format(run.privacy.delta) }}).{% endif %}</p>
{% if admission.refused %}
<h3>Refused updates</h3>
<div class="scroll"><table>
<thead><tr><th class="left">device</th><th>times</th><th class="left">why</th></tr></thead>
<tbody>
{% for row in admission.refused %}
<tr><td class="left">{{ row.device }}</td><td>{{ row.count }}</td><td class="left wrap">{{ row.reason }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
<details><summary>All {{ rounds | length }} rounds</summary>
<div class="scroll"><table>
<thead><tr><th>phase</th><th>attempt</th><th>round</th><th>used</th><th>held-out accuracy</th><th>train loss</th><th>agreement</th><th>λ</th><th>scale</th><th>scope</th><th>up</th><th>down</th><th>time</th></tr></thead>
<tbody>
{% for r in rounds %}
<tr><td>{{ "step %d, " % r.step if r.step else "first freeing, " }}{{ r.phase }}</td><td>{{ r.attempt + 1 }}</td><td>{{ r.round }}</td><td>{{ r.devices_used }} of {{ r.devices_asked }}</td><td>{{ r.heldout_accuracy | pct }}</td><td>{{ r.train_loss | number(".3f") }}</td><td>{{ r.agreement | pct }}</td><td>{{ r["lambda"] | number(".2f") }}</td><td>{{ r.scale | number(".2f") }}</td><td>{{ r.scope }}</td><td>{{ r.bytes_up | size }}</td><td>{{ r.bytes_down | size }}</td><td>{{ r.seconds | duration }}</td></tr>
{% endfor %}
</tbody></table></div>
<dl class="terms">
<dt>agreement</dt><dd>Of the held-out images that the prior gets right, the share that the model gets right too.</dd>
<dt>λ</dt><dd>Weight of the pull towards the prior model in the devices’ loss.</dd>
<dt>scale</dt><dd>Factor on the batch-norm scale of the filters that are being freed: at 0 they are off.</dd>
</dl>
</details>
{% endif %}

<h2>To run it again</h2>
{% if run.command %}<pre>{{ run.command }}</pre>{% endif %}
<dl class="terms">
{% for step in run.steps %}<dt>model, step {{ step.step }}</dt><dd><code>{{ step.model_digest }}</code></dd>
{% endfor %}
<dt>versions</dt><dd>{% for name, version in run.versions.items() %}{{ name }} {{ version }}{{ ", " if not loop.last }}{% endfor %}</dd>
{% if run.data.path %}<dt>data</dt><dd><code>{{ run.data.path }}</code></dd>{% endif %}
</dl>
<details><summary>All settings</summary>
<table><tbody>
{% for name, value in run.settings.items() %}<tr><td>{{ name }}</td><td class="left wrap">{{ value if value is string else value | tojson }}</td></tr>
{% endfor %}
</tbody></table></details>
</body>
</html>
"""
