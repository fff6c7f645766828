"""What coordinator and clients must agree on: values, wire format, configuration, errors."""
