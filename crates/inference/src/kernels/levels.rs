//! Safe functions that the compiler makes vectors of, once for each [`Level`](super::lanes::Level).

/// A function whose body is compiled once for each level; the processor's is called.
macro_rules! for_levels {
    ($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*) $body:block) => {
        $(#[$doc])*
        pub fn $name($($argument: $type),*) {
            #[inline(always)]
            fn body($($argument: $type),*) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($argument: $type),*) {
                body($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($argument: $type),*) {
                body($($argument),*)
            }

            match $crate::kernels::lanes::level() {
                // SAFETY: the level says that the processor has these features.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::lanes::Level::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::lanes::Level::Avx2 => unsafe { avx2($($argument),*) },
                $crate::kernels::lanes::Level::Base => body($($argument),*),
            }
        }
    };
}

pub(super) use for_levels;
