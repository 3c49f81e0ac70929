"""
The search for the weights, `wit-trl sweep`. A file is called after the process that it runs in:

1. `command` reads the flags. Then its process is a `worker`, and several may share a folder.
2. A worker takes trials from the `study`, which Optuna holds: a pair of weights with a seed each.
3. For each it launches the processes of a `trial`. They train, measure, ask how likely the answers of the base model
   still are (`retention`), and write what they found to the trial's folder.
4. The worker reads these files (`results`), tells how sure a difference is (`statistics`), and shows it (`report`).
"""
