"""What a run would cost on machines that are not here: time, memory and traffic from its config alone."""
