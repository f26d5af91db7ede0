"""What a LING2 training step does beyond MaxText's: router losses, loss-free balancing, accumulation, metrics, FLOPs."""
