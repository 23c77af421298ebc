"""Many engines: batches on Ray Data, deployments on Ray Serve."""
