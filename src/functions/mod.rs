//! SQL functions and views. Each file has the functions of one subject; their SQL declarations stand in `sql/`.

mod block_type;
mod cache;
mod deduplicate;
mod inspect;
mod lifecycle;
mod load;
mod maintain;
mod pages;
mod predict;
mod sets;
mod support;

#[cfg(any(test, feature = "pg_test"))]
mod tests;
