"""What every method uses and no method owns: registry, config, types, equations, metrics, optimizers, checkpoints."""
