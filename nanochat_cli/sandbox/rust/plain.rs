// The types whose values may decide a test: those of the standard library. `plain.py` wraps this in a module
// whose name no program can know, so that none can implement the trait for its own types.

pub trait Plain {
    /// Whether every number in it is finite.
    fn finite(&self) -> bool;
}

pub fn any<T: Plain>(value: T) -> T {
    value
}

pub fn finite<T: Plain>(value: T) -> T {
    if !value.finite() {
        ::std::panic!("not a finite number");
    }
    value
}

macro_rules! always {
    ($($kind:ty),*) => { $(impl Plain for $kind { fn finite(&self) -> bool { true } })* };
}
macro_rules! float {
    ($($kind:ty),*) => { $(impl Plain for $kind { fn finite(&self) -> bool { <$kind>::is_finite(*self) } })* };
}
macro_rules! many {
    ($($kind:ty),*) => { $(impl<T: Plain> Plain for $kind {
        fn finite(&self) -> bool { self.iter().all(|one| Plain::finite(one)) }
    })* };
}
macro_rules! pointer {
    ($($kind:ty),*) => { $(impl<T: Plain + ?Sized> Plain for $kind {
        fn finite(&self) -> bool { Plain::finite(&**self) }
    })* };
}
macro_rules! map {
    ($($kind:ty),*) => { $(impl<K: Plain, V: Plain> Plain for $kind {
        fn finite(&self) -> bool { self.iter().all(|(key, one)| Plain::finite(key) && Plain::finite(one)) }
    })* };
}
macro_rules! tuple {
    ($($name:ident $index:tt),*) => { impl<$($name: Plain),*> Plain for ($($name,)*) {
        fn finite(&self) -> bool { true $(&& Plain::finite(&self.$index))* }
    } };
}

always!(bool, char, str, (), i8, i16, i32, i64, i128, isize, u8, u16, u32, u64, u128, usize);
always!(::std::string::String, ::std::cmp::Ordering);
float!(f32, f64);
many!([T], ::std::vec::Vec<T>, ::std::option::Option<T>, ::std::collections::VecDeque<T>);
many!(::std::collections::LinkedList<T>, ::std::collections::BinaryHeap<T>);
many!(::std::collections::BTreeSet<T>, ::std::collections::HashSet<T>);
map!(::std::collections::BTreeMap<K, V>, ::std::collections::HashMap<K, V>);
pointer!(&T, &mut T, ::std::boxed::Box<T>, ::std::rc::Rc<T>, ::std::sync::Arc<T>);
tuple!(A 0);
tuple!(A 0, B 1);
tuple!(A 0, B 1, C 2);
tuple!(A 0, B 1, C 2, D 3);
tuple!(A 0, B 1, C 2, D 3, E 4);
tuple!(A 0, B 1, C 2, D 3, E 4, F 5);

impl<T: Plain, const N: usize> Plain for [T; N] {
    fn finite(&self) -> bool {
        self.iter().all(|one| Plain::finite(one))
    }
}
impl<T: Plain + ?Sized + ::std::borrow::ToOwned> Plain for ::std::borrow::Cow<'_, T> {
    fn finite(&self) -> bool {
        Plain::finite(&**self)
    }
}
impl<T: Plain, E: Plain> Plain for ::std::result::Result<T, E> {
    fn finite(&self) -> bool {
        match self {
            ::std::result::Result::Ok(one) => Plain::finite(one),
            ::std::result::Result::Err(one) => Plain::finite(one),
        }
    }
}
