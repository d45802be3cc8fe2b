//! Settings (GUCs).

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};

static PLAN_CACHE_SIZE: GucSetting<i32> = GucSetting::<i32>::new(256 * 1024);
static INLINE_TENSOR_BYTES: GucSetting<i32> = GucSetting::<i32>::new(32 * 1024);
static SHARE_TRANSPOSED: GucSetting<bool> = GucSetting::<bool>::new(false);
static ENABLE_BATCHING: GucSetting<bool> = GucSetting::<bool>::new(true);
static BATCH_SIZE: GucSetting<i32> = GucSetting::<i32>::new(1024);
static BATCH_MEMORY: GucSetting<i32> = GucSetting::<i32>::new(-1);
static OPERATOR_MEMORY: GucSetting<i32> = GucSetting::<i32>::new(-1);
static MAX_PREDICTION_MEMORY: GucSetting<i32> = GucSetting::<i32>::new(2 * 1024 * 1024);

/// Registers the settings. Called once, when the library is loaded.
pub fn init() {
    GucRegistry::define_int_guc(
        c"tessera.plan_cache_size",
        c"Sets the memory that a session may keep for compiled models.",
        c"The least recently used plan goes first; one is always kept. Raise it when a session alternates between more models than fit, which tessera shows as slow first predictions.",
        &PLAN_CACHE_SIZE,
        0,
        i32::MAX,
        GucContext::Userset,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_int_guc(
        c"tessera.max_prediction_memory",
        c"Sets the memory above which one prediction is refused.",
        c"An estimate from the shapes of all intermediate values, made before the prediction runs: an error is better than a server that runs out of memory. Raise it for large inputs on a server with memory to spare.",
        &MAX_PREDICTION_MEMORY,
        1024,
        i32::MAX,
        GucContext::Suset,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_int_guc(
        c"tessera.inline_tensor_bytes",
        c"Sets the size below which a tensor is kept in the session's plan.",
        c"Larger tensors stay in blocks, which all sessions share in the block cache, if every operator that uses them can compute on blocks.",
        &INLINE_TENSOR_BYTES,
        0,
        i32::MAX,
        GucContext::Userset,
        GucFlags::UNIT_BYTE,
    );
    GucRegistry::define_int_guc(
        c"tessera.operator_memory",
        c"Sets the size above which a value that a prediction computes goes to a temporary file.",
        c"-1 means four times work_mem, at least 64 MB. Values go to files where the operators that make and use them can work on slices.",
        &OPERATOR_MEMORY,
        -1,
        i32::MAX,
        GucContext::Userset,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_bool_guc(
        c"tessera.share_transposed",
        c"Lets a load store a matrix as references to the blocks of its transpose, if these are stored.",
        c"It saves the second copy of tied weights, in the tables and in the block cache. Predictions have the same bits, and take as long from about eight rows on; a single row takes several times as long in that product, which is why it is off by default.",
        &SHARE_TRANSPOSED,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"tessera.enable_batching",
        c"Enables the planner to compute predictions for many rows at a time.",
        c"EXPLAIN shows Custom Scan (Tessera Predict) where it does. Off, each row is a run of the model.",
        &ENABLE_BATCHING,
        GucContext::Userset,
        GucFlags::EXPLAIN,
    );
    GucRegistry::define_int_guc(
        c"tessera.batch_size",
        c"Sets the most rows that are predicted at a time.",
        c"A query begins with few rows and doubles their number up to this, or up to what tessera.batch_memory holds.",
        &BATCH_SIZE,
        1,
        65_536,
        GucContext::Userset,
        GucFlags::EXPLAIN,
    );
    GucRegistry::define_int_guc(
        c"tessera.batch_memory",
        c"Sets the memory for the rows that are predicted at a time, and for what the model computes from them.",
        c"-1 means work_mem. One row is always taken, however large it is.",
        &BATCH_MEMORY,
        -1,
        i32::MAX,
        GucContext::Userset,
        GucFlags::UNIT_KB | GucFlags::EXPLAIN,
    );
    #[cfg(not(feature = "pg14"))]
    // SAFETY: a static string; after all settings with this prefix are defined.
    unsafe {
        pgrx::pg_sys::MarkGUCPrefixReserved(c"tessera".as_ptr())
    };
}

/// Bytes that a session may keep for compiled models.
pub fn plan_cache_bytes() -> u64 {
    PLAN_CACHE_SIZE.get() as u64 * 1024
}

/// True if a matrix may be stored as references to the blocks of its transpose.
pub fn share_transposed() -> bool {
    SHARE_TRANSPOSED.get()
}

/// Bytes below which a tensor is a part of the plan.
pub fn inline_tensor_bytes() -> u64 {
    INLINE_TENSOR_BYTES.get() as u64
}

/// Bytes of a computed value above which it goes to a temporary file.
pub fn operator_memory_bytes() -> u64 {
    match OPERATOR_MEMORY.get() {
        // SAFETY: a setting of PostgreSQL, in kB.
        -1 => (4 * 1024 * unsafe { pgrx::pg_sys::work_mem } as u64).max(64 << 20),
        kilobytes => kilobytes as u64 * 1024,
    }
}

/// Bytes above which one prediction is refused.
pub fn max_prediction_bytes() -> u64 {
    MAX_PREDICTION_MEMORY.get() as u64 * 1024
}

/// Whether queries predict many rows at a time.
pub fn batching() -> bool {
    ENABLE_BATCHING.get()
}

/// The most rows of a batch.
pub fn batch_size() -> usize {
    BATCH_SIZE.get() as usize
}

/// Bytes that a batch and its run may be counted for: a quarter of the setting is left for what the C library keeps between
/// their values.
pub fn batch_bytes() -> usize {
    let setting = match BATCH_MEMORY.get() {
        // SAFETY: a setting of PostgreSQL, in kB.
        -1 => 1024 * unsafe { pgrx::pg_sys::work_mem } as usize,
        kilobytes => kilobytes as usize * 1024,
    };
    setting / 4 * 3
}
