"""What one transformer call does inside its blocks: residuals, slots, attention, modulations."""
