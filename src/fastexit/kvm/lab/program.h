/* Programs of Windows guests: KVM_RUN until one ends, and what it exits for on its way, for init.c. */

/* A program of a Windows guest, as do_execute; exits to user space on its way are answered here and told. */
static void do_program(const uint8_t *payload)
{
	struct { uint32_t slot, unused; struct kvm_regs regs; uint64_t ns, answer; } in;
	struct { int32_t result; uint32_t late, exit_reason, port, exits, ticked; struct kvm_regs regs; } out = { 0 };
	struct { uint32_t reason, type; uint64_t words[4]; } exits[EXITS] = { 0 };
	struct kvm_mp_state state;
	struct kvm_run *run;
	uint8_t *bytes;
	int64_t due, tick;
	int fd;

	memcpy(&in, payload, sizeof in);
	run = guests[in.slot].run;
	fd = guests[in.slot].fd;
	if (ioctl(fd, KVM_GET_MP_STATE, &state)) {
		put(-1, 0);
		return;
	}
	if (state.mp_state != KVM_MP_STATE_RUNNABLE) {
		state.mp_state = KVM_MP_STATE_RUNNABLE;
		if (ioctl(fd, KVM_SET_MP_STATE, &state)) {
			put(-1, 0);
			return;
		}
	}
	if (ioctl(fd, KVM_SET_REGS, &in.regs)) {
		put(-1, 0);
		return;
	}
	tick = between_ticks();
	alarm_every(in.ns);
	due = now() + in.ns;
	for (;;) {
		int result = ioctl(fd, KVM_RUN, 0);

		if (result && errno == EINTR && now() < due)
			continue;
		if (result) {
			out.late = errno == EINTR;
			out.result = -errno;
			break;
		}
		out.exit_reason = run->exit_reason;
		if (run->exit_reason == KVM_EXIT_IO || out.exits == EXITS)
			break;
		exits[out.exits].reason = run->exit_reason;
		if (run->exit_reason == KVM_EXIT_HYPERV) {
			exits[out.exits].type = run->hyperv.type;
			if (run->hyperv.type == KVM_EXIT_HYPERV_SYNIC) {
				exits[out.exits].words[0] = run->hyperv.u.synic.msr;
				exits[out.exits].words[1] = run->hyperv.u.synic.control;
				exits[out.exits].words[2] = run->hyperv.u.synic.evt_page;
				exits[out.exits].words[3] = run->hyperv.u.synic.msg_page;
			} else {
				exits[out.exits].words[0] = run->hyperv.u.hcall.input;
				exits[out.exits].words[2] = run->hyperv.u.hcall.params[0];
				exits[out.exits].words[3] = run->hyperv.u.hcall.params[1];
				run->hyperv.u.hcall.result = in.answer;
			}
		} else if (run->exit_reason == KVM_EXIT_SYSTEM_EVENT) {
			exits[out.exits].type = run->system_event.type;
		} else if (run->exit_reason == KVM_EXIT_X86_RDMSR || run->exit_reason == KVM_EXIT_X86_WRMSR) {
			exits[out.exits].type = run->msr.reason;
			exits[out.exits].words[0] = run->msr.index;
			exits[out.exits].words[1] = run->exit_reason == KVM_EXIT_X86_WRMSR ? run->msr.data : 0;
			run->msr.error = in.answer & 1;
			run->msr.data = in.answer;
		} else if (run->exit_reason == KVM_EXIT_IOAPIC_EOI) {
			exits[out.exits].words[0] = run->eoi.vector;
		} else if (run->exit_reason == KVM_EXIT_MMIO) {
			exits[out.exits].words[0] = run->mmio.phys_addr;
			exits[out.exits].type = run->mmio.is_write;
			memset(run->mmio.data, 0, sizeof run->mmio.data);
		} else {
			break;
		}
		out.exits++;
	}
	out.ticked = (now() - tick_phase) / tick_ns != tick;
	alarm_every(0);
	if (run->exit_reason == KVM_EXIT_IO)
		out.port = run->io.port;
	if (ioctl(fd, KVM_GET_REGS, &out.regs)) {
		put(-1, 0);
		return;
	}
	bytes = room(sizeof out + sizeof exits);
	if (!bytes) {
		put_error(ENOSPC);
		return;
	}
	memcpy(bytes, &out, sizeof out);
	memcpy(bytes + sizeof out, exits, out.exits * sizeof *exits);
	put(0, sizeof out + out.exits * sizeof *exits);
}

/* Brings a vCPU that an INIT or an NMI has taken away back to where programs run: no NMI, RUNNABLE, these segments and
 * control registers, with the APICBASE and CR8 that it has. */
static void do_make_ready(const uint8_t *payload)
{
	struct { uint32_t slot, unused; struct kvm_sregs sregs; } in;
	struct kvm_vcpu_events events = { .flags = KVM_VCPUEVENT_VALID_NMI_PENDING };
	struct kvm_mp_state state;
	struct kvm_sregs now;
	int fd;

	memcpy(&in, payload, sizeof in);
	fd = guests[in.slot].fd;
	if (ioctl(fd, KVM_SET_VCPU_EVENTS, &events) || ioctl(fd, KVM_GET_MP_STATE, &state)) {
		put(-1, 0);
		return;
	}
	state.mp_state = KVM_MP_STATE_RUNNABLE;
	if (ioctl(fd, KVM_SET_MP_STATE, &state) || ioctl(fd, KVM_GET_SREGS, &now)) {
		put(-1, 0);
		return;
	}
	in.sregs.apic_base = now.apic_base;
	in.sregs.cr8 = now.cr8;
	put(ioctl(fd, KVM_SET_SREGS, &in.sregs), 0);
}
