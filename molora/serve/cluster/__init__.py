"""cluster: one server on several processes or machines, by Ray Serve: an ingress, and replicas of the engine."""
