//! How many blocks may be merged.

/// In which steps the bound is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Walk {
    /// So many blocks more each time, up to the first time that is not accepted. Published: 5, and 10 for models with
    /// very wide outputs. 0 is taken as 1.
    Steps(usize),
    /// All at once, and then by halves. Right where merging more never helps; else it still finds a number of blocks
    /// that was accepted, maybe not the one that the steps find.
    Bisect,
}

/// The largest number of blocks, up to `total`, with which `accept` was true; 0, which is not asked for, if there is
/// none. `accept(n)` says whether the metric is within its bound with the first n merged.
///
/// Evaluations: at most ceil(total / step) for steps, at most 1 + ceil(log2(total)) for halves, where one is enough if
/// all may be merged. The result was itself evaluated, unless it is 0.
///
/// # Errors
/// The first one of `accept`.
pub fn largest_prefix<E>(
    total: usize,
    walk: Walk,
    accept: &mut dyn FnMut(usize) -> Result<bool, E>,
) -> Result<usize, E> {
    let mut good = 0;
    match walk {
        Walk::Steps(step) => {
            while good < total {
                let next = good.saturating_add(step.max(1)).min(total);
                if !accept(next)? {
                    break;
                }
                good = next;
            }
        }
        Walk::Bisect => {
            if total == 0 || accept(total)? {
                return Ok(total);
            }
            let mut bad = total;
            while bad - good > 1 {
                let middle = good + (bad - good) / 2;
                if accept(middle)? {
                    good = middle;
                } else {
                    bad = middle;
                }
            }
        }
    }
    Ok(good)
}
