//! Two machines, the same drawn operations: one by the call of each, where an IPI goes the short way, the other by exit
//! records through the whole run loop. Every result is compared, then every byte; then each vCPU gets a thread.
mod fastexit;
mod sys;
use fastexit::Machine;

const VCPUS: u64 = 4;
const OPERATIONS: u32 = 200_000;
const WRMSR: u32 = 32; // VMX's exit reason

struct Draw(u64);

impl Draw {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
    fn wrmsr(&mut self) -> (u32, u64) {
        let icr = self.below(VCPUS + 1) << 32 | (16 + self.below(240));
        match self.below(16) {
            0 => (0x830, icr | 3 << 18),   // all but self
            1 => (0x830, icr | 1 << 20),   // a reserved bit: #GP
            2 => (0x830, icr | 0x800),     // logical
            3 => (0x808, self.below(256)), // TPR
            4 => (0x80b, 0),               // EOI
            _ => (0x830, icr),
        }
    }
}

fn main() -> Result<(), String> {
    let (mut one, mut other) = (Machine::open(VCPUS as u32)?, Machine::open(VCPUS as u32)?);
    let (mut draw, mut fast) = (Draw(1), 0);
    let ((_, mut a), (_, mut b)) = (one.split(), other.split());
    for n in 0..OPERATIONS {
        let (v, (msr, value)) = (draw.below(VCPUS) as usize, draw.wrmsr());
        let result = a[v].wrmsr(msr, value);
        assert_eq!(result, b[v].exit(WRMSR, msr, value), "operation {n}: {msr:#x} {value:#x}");
        assert_eq!((a[v].notify(), a[v].ack()), (b[v].notify(), b[v].ack()), "operation {n}");
        fast += u32::from(result.path);
    }
    assert!(one.snapshot() == other.snapshot(), "the machines' bytes differ");
    println!("{OPERATIONS} operations by two doors agree, {fast} of them fast");

    let (machine, vcpus) = one.split(); // each to a thread of its own, and a device's messages beside them
    std::thread::scope(|threads| {
        for mut vcpu in vcpus {
            let icr = ((u64::from(vcpu.1) + 1) % VCPUS) << 32 | 0x41;
            threads.spawn(move || assert!((0..10_000).all(|_| vcpu.wrmsr(0x830, icr).status == 0)));
        }
        assert!((0..10_000).all(|_| machine.inject(0xfee0_0000, 0x51).status == 0));
    });
    println!("{VCPUS} threads and a device: every call was done");
    Ok(())
}
