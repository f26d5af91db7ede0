"""What a training job needs and takes, before its chips are rented: `maxtext-ling2 plan`."""
