"""MaxText's commands, run in a separate process and followed: `maxtext-ling2 train`, `sft`, `convert`, `export`, `demo`.

What is run is printed as text that can be pasted into a shell (shell.py). Its settings are the user's, and those that it
needs on this machine (settings.py, train.py, convert.py). The output goes to a log (process.py), of which little is
shown (log.py); progress comes from the metrics_file (metrics.py, progress.py). Signals are passed on, so that the trainer
can save. At the end there are a summary, a plot and the next commands (train.py, plot.py, next_commands.py).
"""
