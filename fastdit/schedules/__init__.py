"""Which component is computed when: schedules, the files they come from, and the plan of a run."""
