//! Models at work in this session: what a name means, compiled plans, where their blocks come from, settings.

mod models;
pub mod sets;
pub mod settings;
mod source;

pub use models::{Model, compile, model_as_declared, model_of, on_trial, remember, run, run_trial, try_run};
