"""Run a dataset at several temperatures, and print the scores beside each other."""

import llmpipe

for temperature in (0.0, 0.7, 1.2):
    options = ["dataset=questions", "dataset.limit=40", f"sampling.temperature={temperature}"]
    metrics = llmpipe.run(llmpipe.compose(options), f"temperature-{temperature}")  # again: it goes on where it was
    print(f"temperature {temperature}: {metrics['scores']['exact_match']:.1%} of {metrics['rows_ok']} rows")
