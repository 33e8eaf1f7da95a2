//! Ports that stay the same over restarts.

use crate::output::Output;

/// A port as the user gave it, or the usual one.
pub struct Port {
    option: &'static str,
    given: Option<u16>,
    usual: u16,
}

impl Port {
    /// `option` sets it.
    pub fn new(option: &'static str, given: Option<u16>, usual: u16) -> Self {
        Self { option, given, usual }
    }

    /// The ports to try, one after the other. 0 is a free port, which also stands in for the usual one.
    pub fn candidates(&self) -> impl Iterator<Item = u16> {
        let first = self.given.unwrap_or(self.usual);
        let others = (first == 0 || self.given.is_none()).then(|| std::iter::repeat(0));
        std::iter::once(first).chain(others.into_iter().flatten())
    }

    /// Says that the usual port was in use, if it is another one.
    pub fn tell(&self, used: u16, out: Output) {
        if self.given.is_none() && used != self.usual {
            let Self { option, usual, .. } = self;
            out.note(format_args!("port {usual} is in use: {option} is {used}"));
        }
    }

    /// What to say if none of the ports can be used.
    pub fn remedy(&self, problem: Option<&std::io::Error>) -> String {
        let Self { option, given, usual } = self;
        let number = given.unwrap_or(*usual);
        let why = match problem {
            Some(error) if error.kind() == std::io::ErrorKind::AddrInUse => ": it is in use".into(),
            Some(error) => format!(": {error}"),
            None => String::new(),
        };
        format!("cannot listen on port {number}{why}; give {option} another one, or omit it")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_port_stands_in_for_the_usual_one_only() {
        let candidates =
            |given| -> Vec<u16> { Port::new("--port", given, 7080).candidates().take(3).collect() };
        assert_eq!(candidates(None), [7080, 0, 0]);
        assert_eq!(candidates(Some(9)), [9]);
        assert_eq!(candidates(Some(0)), [0, 0, 0]);
    }
}
