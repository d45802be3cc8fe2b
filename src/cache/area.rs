//! Finding the area: the server's, or one of this process.

use super::layout::{Area, LOCKS, Plan};
use super::settings;
use crate::pg::error;
use crate::pg::shmem::{self, Region, Request};
use pgrx::prelude::*;
use std::sync::OnceLock;

static AREA: OnceLock<Area> = OnceLock::new();

/// Registers the settings and, while the library is preloaded, asks for shared memory.
pub fn init() {
    settings::init();
    if shmem::preloading() {
        shmem::request(Request {
            name: c"pg_tessera block cache",
            bytes: || Plan::of_server().total,
            locks: LOCKS as i32,
            set_up: |region, found| {
                let area = Area::new(region.clone(), Plan::of_server());
                if !found {
                    area.set_up();
                }
                area.is_ours()
            },
        });
    }
}

/// The area that this process uses. The first call may raise an ERROR (no memory), and tells the session if it has a
/// cache of its own.
pub fn area() -> &'static Area {
    AREA.get_or_init(|| shared().unwrap_or_else(private))
}

/// The area, if this process has used it or it is the server's: for views, which need not make one.
pub fn existing() -> Option<&'static Area> {
    if AREA.get().is_none() && Region::shared().is_none() {
        return None;
    }
    Some(area())
}

fn shared() -> Option<Area> {
    let region = Region::shared()?;
    let plan = Plan::of_server();
    if region.bytes() != plan.total {
        outdated();
        return None;
    }
    let area = Area::new(region, plan);
    if !area.is_ours() {
        outdated();
        return None;
    }
    Some(area)
}

fn private() -> Area {
    let plan = Plan::of_process();
    let region = Region::private(plan.total).unwrap_or_else(|| {
        error::raise(
            PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY,
            "no memory for a block cache of this session",
            &format!("It would take up to {} kB.", plan.total / 1024),
            "Lower tessera.block_cache_size, or add pg_tessera to shared_preload_libraries for a cache that all sessions share.",
        )
    });
    let area = Area::new(region, plan);
    area.set_up();
    if Region::shared().is_none() {
        error::notice(
            "the block cache is of this session alone",
            "Add pg_tessera to shared_preload_libraries, and restart the server, for a cache that all sessions share.",
        );
    }
    area
}

fn outdated() {
    error::notice(
        "the library of pg_tessera is not the one with which the server started, so the block cache is of this session alone",
        "Restart the server.",
    );
}

/// Gives this process, which has used no cache yet, one of its own with so many frames.
#[cfg(any(test, feature = "pg_test"))]
pub fn use_private(frames: usize) {
    let plan = Plan::new(frames, 1);
    let area = Area::new(Region::private(plan.total).expect("memory"), plan);
    area.set_up();
    assert!(AREA.set(area).is_ok(), "the cache was used already");
}
