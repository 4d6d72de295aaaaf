/* A guest that uses Hyper-V's doors to the local APIC as an operating system does, on up to 8 vCPUs.
 *
 * The first vCPU begins here in 64-bit mode with the tables of hvguest.py, and starts the others by INIT and SIPI. Each
 * sets up its synthetic MSRs, then works for some rounds: sends IPIs by MSR and by hypercalls, raises its TPR, arms
 * timers, asks its VMM for messages, sleeps. Handlers end interrupts by the assist page where it says so, else by MSR.
 * What a vCPU has done is counted by door, for whoever compares it with the trace. windows.py has the same numbers.
 *
 * Spec: TLFS, chapters 3 (hypercalls), 10 (virtual interrupts), 11 (inter-partition communication), 12 (timers).
 */
#include <stdint.h>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

enum { CPUS = 8, STACK = 8192, TALLY = 0x10000, INPUTS = 0x12000, HYPERCALL_PAGE = 0x13000, PAGES = 0x40000, IDT = 0x2000, TRAMPOLINE = 0x8000 };
enum { PORT_DONE = 0x10, PORT_FAILED = 0x12, PORT_MESSAGE = 0x14, ALL_PAGES = 0x10000 };
enum { DPC = 0x2f, DEVICE = 0x51, SELF_ENDING = 0x96, TIMER_MESSAGE = 0x97, CLOCK = 0xd1, WORK = 0xe1, DIRECT = 0xed, MESSAGE = 0xf3 };
enum { SINT_MESSAGE = 2, SINT_SELF_ENDING = 3, SINT_TIMER = 4 };
enum {
	GUEST_OS_ID = 0x40000000, HYPERCALL, VP_INDEX, TIME_REF_COUNT = 0x40000020, EOI = 0x40000070, ICR, TPR, VP_ASSIST_PAGE,
	SCONTROL = 0x40000080, SVERSION, SIEFP, SIMP, EOM, SINT0 = 0x40000090, STIMER0_CONFIG = 0x400000b0, STIMER0_COUNT,
};
enum { X2APIC = 1 };
enum { IPI_MSR, IPI_CALL, EOI_MSR, EOI_ASSIST, TPR_MSR, TIMER, END_OF_MESSAGE, SINT_SET_UP, ASSIST_PAGE, SPIN_WAIT, TAKEN, HALTS, COUNTED = 16 };

struct common {
	u64 tally[CPUS][COUNTED];
	u32 cpus, rounds, mode, alive, ready, go, finished, seed;
};

#define shared ((volatile struct common *)TALLY)

static volatile u32 taken[CPUS][256];
static u8 stacks[CPUS][STACK] __attribute__((aligned(STACK)));

static void count(u32 cpu, u32 what)
{
	shared->tally[cpu][what]++;
}

/* ------------------------------------------------------------------------------------------------------ instructions */

static u32 this_cpu(void)
{
	u64 sp;

	asm volatile("mov %%rsp, %0" : "=r"(sp));
	return *(volatile u32 *)(sp & -(u64)STACK);
}

static void wrmsr(u32 msr, u64 value)
{
	asm volatile("wrmsr" : : "c"(msr), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}

static u64 rdmsr(u32 msr)
{
	u32 low, high;

	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
	return low | (u64)high << 32;
}

static void out(u32 port, u32 value)
{
	asm volatile("out %%eax, %%dx" : : "d"(port), "a"(value) : "memory");
}

static void spin(u32 turns)
{
	while (turns--)
		asm volatile("pause" : : : "memory");
}

static volatile u32 *page(u32 reg)
{
	return (volatile u32 *)(0xfee00000ul + reg);
}

/* ------------------------------------------------------------------------------------------------------------ pages */

static u8 *assist_page(u32 cpu)
{
	return (u8 *)(u64)(PAGES + cpu * ALL_PAGES);
}

static u8 *message_page(u32 cpu)
{
	return assist_page(cpu) + 0x1000;
}

static u8 *event_page(u32 cpu)
{
	return assist_page(cpu) + 0x2000;
}

static u64 *input(u32 cpu)
{
	return (u64 *)(u64)(INPUTS + cpu * 0x200);
}

/* --------------------------------------------------------------------------------------------------------- hypercalls */

static u64 hypercall(u64 control, u64 in, u64 out_address)
{
	register u64 r8 asm("r8") = out_address;
	u64 status, page_at = HYPERCALL_PAGE;

	asm volatile("call *%[page]"
		     : "=a"(status), "+c"(control), "+d"(in), "+r"(r8)
		     : [page] "r"(page_at)
		     : "memory", "r9", "r10", "r11");
	return status;
}

/* A fast call whose further input is in XMM0: mask of banks, first bank. */
static u64 hypercall_xmm(u64 control, u64 in, u64 format, u64 banks, u64 bank)
{
	u64 words[2] = { banks, bank };

	asm volatile("movdqu %0, %%xmm0" : : "m"(words) : "memory");
	return hypercall(control, in, format);
}

enum { SEND_IPI = 0xb, SEND_IPI_EX = 0x15, LONG_SPIN_WAIT = 8, FAST = 1 << 16, ONE_BANK = 1 << 17 };

static void failed(u32 why)
{
	out(PORT_FAILED, why | this_cpu() << 24);
	for (;;)
		asm volatile("cli; hlt");
}

static void call_ipi(u32 cpu, u32 how, u32 vector, u64 vps)
{
	u64 *in = input(cpu), status;

	count(cpu, IPI_CALL);
	in[0] = vector;
	switch (how) {
	case 0:
		status = hypercall(SEND_IPI | FAST, vector, vps);
		break;
	case 1:
		in[1] = vps;
		status = hypercall(SEND_IPI, (u64)in, 0);
		break;
	case 2:
		status = hypercall_xmm(SEND_IPI_EX | FAST | ONE_BANK, vector, 0, 1, vps);
		break;
	case 3:
		in[1] = 0;
		in[2] = 1;
		in[3] = vps;
		status = hypercall(SEND_IPI_EX | ONE_BANK, (u64)in, 0);
		break;
	default:
		in[1] = 1;
		in[2] = 0;
		status = hypercall(SEND_IPI_EX, (u64)in, 0);
	}
	if (status)
		failed(0x1000 | status);
}

/* ---------------------------------------------------------------------------------------------------------------- APIC */

enum { FIXED, INIT = 5 << 8, SIPI = 6 << 8, ASSERT = 1 << 14, LOGICAL = 1 << 11, TO_SELF = 1 << 18, TO_ALL = 2 << 18, TO_OTHERS = 3 << 18 };

static void msr_ipi(u32 cpu, u32 low, u32 destination)
{
	count(cpu, IPI_MSR);
	wrmsr(ICR, low | (u64)destination << (shared->mode & X2APIC ? 32 : 56));
}

static void set_tpr(u32 cpu, u32 value)
{
	count(cpu, TPR_MSR);
	wrmsr(TPR, value);
}

static void set_timer(u32 cpu, u32 msr, u64 value)
{
	count(cpu, TIMER);
	wrmsr(msr, value);
}

static u64 now(void)
{
	return rdmsr(TIME_REF_COUNT);
}

static void end_of_interrupt(u32 cpu)
{
	u8 spared;

	asm volatile("lock btrl $0, %0; setc %1" : "+m"(*(u32 *)assist_page(cpu)), "=r"(spared) : : "cc", "memory");
	if (spared) {
		count(cpu, EOI_ASSIST);
	} else {
		count(cpu, EOI_MSR);
		wrmsr(EOI, 0);
	}
}

/* A message is taken out of its slot; who wants the slot next learns that it is free. */
static void take_message(u32 cpu, u32 sint)
{
	volatile u32 *slot = (volatile u32 *)(message_page(cpu) + 256 * sint);

	if (!slot[0])
		return;
	slot[0] = 0;
	asm volatile("mfence" : : : "memory");
	if (slot[1] >> 8 & 1) {
		count(cpu, END_OF_MESSAGE);
		wrmsr(EOM, 0);
	}
}

static void handle(u32 vector)
{
	u32 cpu = this_cpu();

	count(cpu, TAKEN);
	if (vector == MESSAGE)
		take_message(cpu, SINT_MESSAGE);
	if (vector == SELF_ENDING)
		take_message(cpu, SINT_SELF_ENDING);
	if (vector == TIMER_MESSAGE)
		take_message(cpu, SINT_TIMER);
	if (vector == DPC) {
		asm volatile("sti");
		spin(20);
		asm volatile("cli");
	}
	taken[cpu][vector]++;
	if (vector != SELF_ENDING)
		end_of_interrupt(cpu);
}

struct frame;

#define HANDLER(vector) static __attribute__((interrupt)) void on_##vector(struct frame *frame) { (void)frame; handle(vector); }
HANDLER(DPC)
HANDLER(DEVICE)
HANDLER(SELF_ENDING)
HANDLER(TIMER_MESSAGE)
HANDLER(CLOCK)
HANDLER(WORK)
HANDLER(DIRECT)
HANDLER(MESSAGE)

static __attribute__((interrupt)) void unexpected(struct frame *frame)
{
	(void)frame;
	failed(0x2000);
}

static void gate(u32 vector, void (*handler)(struct frame *))
{
	volatile u32 *entry = (volatile u32 *)(u64)(IDT + 16 * vector);
	u64 at = (u64)handler;

	entry[0] = 8 << 16 | (at & 0xffff);
	entry[1] = (at & 0xffff0000) | 0x8e00;
	entry[2] = at >> 32;
	entry[3] = 0;
}

static void load_idt(void)
{
	struct { uint16_t limit; u64 base; } __attribute__((packed)) idtr = { 0xfff, IDT };

	asm volatile("lidt %0" : : "m"(idtr));
}

/* -------------------------------------------------------------------------------------------------------------- work */

static void wait_for(volatile u32 *what, u32 value)
{
	u32 cpu = this_cpu(), turns = 0;

	while (*what == value) {
		asm volatile("pause" : : : "memory");
		if (++turns % 0x4000 == 0) {
			count(cpu, SPIN_WAIT);
			hypercall(LONG_SPIN_WAIT | FAST, turns, 0);
		}
	}
}

/* Sleeps until a vector was taken; the clock is on, so that nothing sleeps for ever. */
static void sleep_until(u32 cpu, u32 vector, u32 before)
{
	for (;;) {
		asm volatile("cli");
		if (taken[cpu][vector] != before)
			break;
		count(cpu, HALTS);
		asm volatile("sti; hlt");
	}
	asm volatile("sti");
}

static u32 drawn(u32 *state)
{
	*state = *state * 1664525 + 1013904223;
	return *state >> 8;
}

static void set_up(u32 cpu)
{
	load_idt();
	if (shared->mode & X2APIC) {
		wrmsr(0x1b, rdmsr(0x1b) | 1 << 10);
		if (rdmsr(0x802) != cpu || (rdmsr(0x803) & 0xff) < 0x14)
			failed(0x3002);
		wrmsr(0x80f, 0x1ff);
	} else {
		if (*page(0x20) >> 24 != cpu || (*page(0x30) & 0xff) < 0x14)
			failed(0x3002);
		*page(0xe0) = 0xffffffff;
		*page(0xd0) = 1u << (24 + cpu);
		*page(0xf0) = 0x1ff;
	}
	if (rdmsr(VP_INDEX) != cpu)
		failed(0x3000);
	count(cpu, ASSIST_PAGE);
	wrmsr(VP_ASSIST_PAGE, (u64)assist_page(cpu) | 1);
	wrmsr(SIMP, (u64)message_page(cpu) | 1);
	wrmsr(SIEFP, (u64)event_page(cpu) | 1);
	wrmsr(SINT0 + SINT_MESSAGE, MESSAGE);
	wrmsr(SINT0 + SINT_SELF_ENDING, SELF_ENDING | 1 << 17);
	wrmsr(SINT0 + SINT_TIMER, TIMER_MESSAGE);
	wrmsr(SCONTROL, 1);
	shared->tally[cpu][SINT_SET_UP] += 6;
	set_timer(cpu, STIMER0_CONFIG, 1 << 12 | DIRECT << 4 | 1 << 3);
	set_timer(cpu, STIMER0_CONFIG + 2, SINT_SELF_ENDING << 16 | 1 << 3);
	set_timer(cpu, STIMER0_CONFIG + 4, SINT_TIMER << 16 | 1 << 1);
	set_timer(cpu, STIMER0_CONFIG + 6, SINT_SELF_ENDING << 16 | 1 << 3);
	set_tpr(cpu, 0);
	if (rdmsr(TPR))
		failed(0x3001);
}

static void work(u32 cpu)
{
	u32 state = shared->seed + 977 * cpu, cpus = shared->cpus;

	for (u32 round = 0; round < shared->rounds; round++) {
		u32 other = (cpu + 1 + drawn(&state) % (cpus - 1)) % cpus, kind = drawn(&state) % 20;
		u32 vector = (u32[]){ DPC, CLOCK, WORK, WORK }[drawn(&state) % 4], before;
		u64 everybody = (1u << cpus) - 1, others = everybody & ~(1ull << cpu), at;

		switch (kind) {
		case 0:
		case 1:
		case 2:
		case 3:
			before = taken[other][vector];
			msr_ipi(cpu, vector, other);
			wait_for(&taken[other][vector], before);
			break;
		case 4:
			msr_ipi(cpu, vector | TO_OTHERS, 0);
			break;
		case 5:
			msr_ipi(cpu, vector | LOGICAL, (u32)others);
			break;
		case 6:
			msr_ipi(cpu, vector, shared->mode & X2APIC ? 0xffffffff : 0xff);
			break;
		case 7:
			msr_ipi(cpu, vector | TO_SELF, 0);
			msr_ipi(cpu, vector, cpu);
			break;
		case 8:
		case 9:
			call_ipi(cpu, 0, vector, drawn(&state) & everybody);
			break;
		case 10:
			call_ipi(cpu, 1, vector, others);
			break;
		case 11:
			call_ipi(cpu, 2, vector, drawn(&state) & everybody);
			break;
		case 12:
			call_ipi(cpu, 3, vector, others);
			break;
		case 13:
			call_ipi(cpu, 4, vector, 0);
			break;
		case 14:
			before = taken[cpu][DEVICE];
			set_tpr(cpu, 0xd0);
			msr_ipi(cpu, DEVICE, cpu);
			call_ipi(cpu, 0, DPC, 1ull << cpu);
			spin(50);
			if (taken[cpu][DEVICE] != before)
				failed(0x4000);
			set_tpr(cpu, 0);
			wait_for(&taken[cpu][DEVICE], before);
			break;
		case 15:
		case 16:
			before = taken[cpu][DIRECT];
			set_timer(cpu, STIMER0_COUNT, now() + 2000);
			sleep_until(cpu, DIRECT, before);
			break;
		case 17:
			before = taken[cpu][SELF_ENDING];
			at = now() + 50000;
			set_timer(cpu, STIMER0_COUNT + 2, at);
			set_timer(cpu, STIMER0_COUNT + 6, at); /* finds the slot taken: its message waits for EOM */
			sleep_until(cpu, SELF_ENDING, before);
			msr_ipi(cpu, SELF_ENDING, other);
			break;
		case 18:
			before = taken[cpu][TIMER_MESSAGE];
			set_timer(cpu, STIMER0_COUNT + 4, 20000);
			set_timer(cpu, STIMER0_CONFIG + 4, SINT_TIMER << 16 | 1 << 1 | 1);
			sleep_until(cpu, TIMER_MESSAGE, before);
			set_timer(cpu, STIMER0_CONFIG + 4, SINT_TIMER << 16 | 1 << 1);
			break;
		default:
			before = taken[cpu][MESSAGE];
			out(PORT_MESSAGE, cpu);
			sleep_until(cpu, MESSAGE, before);
		}
	}
}

/* --------------------------------------------------------------------------------------------------------- beginnings */

/* Where an AP's first 64-bit code comes to, on its own stack. */
__attribute__((used)) static void ap_main(u32 cpu)
{
	*(volatile u32 *)stacks[cpu] = cpu;
	set_up(cpu);
	__sync_fetch_and_add(&shared->ready, 1);
	asm volatile("sti");
	wait_for(&shared->go, 0);
	work(cpu);
	__sync_fetch_and_add(&shared->finished, 1);
	for (;;) {
		count(cpu, HALTS);
		asm volatile("hlt");
	}
}

extern u8 trampoline[], trampoline_end[];

asm(".text\n"
    ".code16\n"
    ".globl trampoline, trampoline_end\n"
    "trampoline:\n"
    "	cli\n"
    "	xorw %ax, %ax\n"
    "	movw %ax, %ds\n"
    "	lgdtl 0x8000 + (gdtr - trampoline)\n"
    "	movl $0x620, %eax\n"
    "	movl %eax, %cr4\n"
    "	movl $0x3000, %eax\n"
    "	movl %eax, %cr3\n"
    "	movl $0xc0000080, %ecx\n"
    "	rdmsr\n"
    "	orl $0x100, %eax\n"
    "	wrmsr\n"
    "	movl $0x80000031, %eax\n"
    "	movl %eax, %cr0\n"
    "	ljmpl $8, $ap_start\n"
    "gdtr:	.word 31\n"
    "	.long 0x1000\n"
    "trampoline_end:\n"
    ".code64\n"
    "ap_start:\n"
    "	movl $0x10, %eax\n"
    "	movl %eax, %ds\n"
    "	movl %eax, %es\n"
    "	movl %eax, %ss\n"
    "	movl $1, %edi\n"
    "	lock xaddl %edi, 0x1040c\n"
    "	leal 1(%rdi), %eax\n"
    "	shll $13, %eax\n"
    "	leaq stacks(%rax), %rsp\n"
    "	pushq $0\n"
    "	jmp ap_main\n");

_Static_assert(TALLY + __builtin_offsetof(struct common, alive) == 0x1040c, "the trampoline's address of shared.alive");
_Static_assert(STACK == 1 << 13, "the trampoline's size of a stack");

__attribute__((noreturn)) void bsp_main(void)
{
	u32 cpus = shared->cpus;

	*(volatile u32 *)stacks[0] = 0;
	shared->alive = 1;
	for (u32 vector = 0; vector < 256; vector++)
		gate(vector, unexpected);
	gate(DPC, on_DPC);
	gate(DEVICE, on_DEVICE);
	gate(SELF_ENDING, on_SELF_ENDING);
	gate(TIMER_MESSAGE, on_TIMER_MESSAGE);
	gate(CLOCK, on_CLOCK);
	gate(WORK, on_WORK);
	gate(DIRECT, on_DIRECT);
	gate(MESSAGE, on_MESSAGE);
	for (u8 *from = trampoline, *to = (u8 *)TRAMPOLINE; from < trampoline_end;)
		*to++ = *from++;
	wrmsr(GUEST_OS_ID, 0x0001040a00003839);
	wrmsr(HYPERCALL, HYPERCALL_PAGE | 1);
	set_up(0);
	for (u32 cpu = 1; cpu < cpus; cpu++) {
		msr_ipi(0, INIT | ASSERT, cpu);
		spin(1000);
		msr_ipi(0, SIPI | ASSERT | TRAMPOLINE >> 12, cpu);
		while (shared->ready < cpu)
			spin(100);
	}
	asm volatile("sti");
	shared->go = 1;
	work(0);
	__sync_fetch_and_add(&shared->finished, 1);
	while (shared->finished < cpus) {
		u32 before = taken[0][DIRECT];

		set_timer(0, STIMER0_COUNT, now() + 20000);
		sleep_until(0, DIRECT, before);
	}
	for (u32 cpu = 1; cpu < cpus; cpu++) {
		u32 before = taken[cpu][DEVICE];

		msr_ipi(0, DEVICE, cpu);
		wait_for(&taken[cpu][DEVICE], before);
	}
	rdmsr(VP_INDEX);
	out(PORT_DONE, 0);
	for (;;)
		asm volatile("cli; hlt");
}

asm(".globl _start\n"
    "_start:\n"
    "	leaq stacks + 8192, %rsp\n"
    "	pushq $0\n"
    "	jmp bsp_main\n");
