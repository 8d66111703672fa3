"""What a third party needs to prove a part of its own: conformance suites, and tiny models with an exact oracle."""
